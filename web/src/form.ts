// The form: the dozen settings that matter first, and all others behind one fold, from the engine's own option rows.
import type { Form, Option } from "./engine";
import type { Question } from "./question";
import { TEXTS } from "./texts";

const FIRST_SETTINGS = [
  ...["method", "gpu", "batch_size", "seq_len", "gpus", "grad_accum", "rank", "optimizer", "precision"],
  ...["checkpointing", "attention", "zero", "offload", "profile"],
];

const EIGHTHS = Array.from({ length: 41 }, (_, n) => 64 * Math.round(2 * 2 ** (n / 4))); // of 128 to 128k tokens
/** Settings with a slider, and its values. */
export const SLIDERS: Readonly<Record<string, readonly number[]>> = {
  batch_size: [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128],
  seq_len: EIGHTHS,
};
const START: Readonly<Record<string, number>> = { batch_size: 1, seq_len: 2048 }; // of a setting that is left open

type Attributes = Readonly<Record<string, string>>;

export function element<K extends keyof HTMLElementTagNameMap>(
  name: K,
  attributes: Attributes = {},
  ...content: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...content);
  return made;
}

/** Draws the form into `place`. */
export function drawForm(place: HTMLElement, form: Form): void {
  const rows = Object.values(form.headings).flat();
  const first = FIRST_SETTINGS.flatMap((name) => rows.filter((row) => row.name === name));
  const views = form.views.map((view, n) => {
    const chosen: Attributes = n === 0 ? { checked: "" } : {};
    const radio = element("input", { type: "radio", name: "view", value: view, ...chosen });
    return element("label", { class: "view" }, radio, TEXTS.views[view] ?? view);
  });
  const models = Object.entries(form.models).map(([name, id]) => element("option", { value: name }, id));
  const model = element("input", { ...TYPED, id: "o-model", name: "model", list: "models", title: TEXTS.modelHelp });
  place.replaceChildren(
    element("fieldset", { class: "views" }, element("legend", {}, TEXTS.view), ...views),
    element(
      "div",
      { class: "fields" },
      element("div", { class: "field wide" }, element("label", { for: "o-model" }, TEXTS.model), model),
      element("datalist", { id: "models" }, ...models),
      ...first.map((row) => field(row, TEXTS.labels[row.name] ?? flag(row), false)),
    ),
    element(
      "details",
      { id: "others" },
      element("summary", {}, TEXTS.others),
      ...Object.entries(form.headings).flatMap(([heading, options]) => {
        const others = options.filter((row) => !first.includes(row)).map((row) => field(row, flag(row), true));
        const legend = element("legend", {}, heading);
        return others.length ? [element("fieldset", {}, legend, element("div", { class: "fields" }, ...others))] : [];
      }),
    ),
  );
}

const TYPED = { type: "text", autocomplete: "off", spellcheck: "false", autocapitalize: "off" };

function flag(row: Option): string {
  return `--${row.name.replaceAll("_", "-")}`;
}

function field(row: Option, label: string, showsHelp: boolean): HTMLElement {
  const id = `o-${row.name}`;
  const help: Attributes = showsHelp ? { "aria-describedby": `${id}-help` } : { title: row.help };
  const parts = [element("label", { for: id }, label), input(row, { id, name: row.name, ...help })];
  if (row.choices.length && !row.closed) {
    const choices = row.choices.map((choice) => element("option", { value: choice }));
    parts.push(element("datalist", { id: `${id}-list` }, ...choices));
  }
  const values = SLIDERS[row.name];
  if (values) {
    const range = { min: "0", max: String(values.length - 1), "aria-label": TEXTS.slider(label) };
    parts.push(element("input", { type: "range", "data-of": row.name, ...range }));
  }
  if (showsHelp) parts.push(element("small", { id: `${id}-help` }, row.help));
  return element("div", { class: "field" }, ...parts);
}

function input(row: Option, attributes: Attributes): HTMLElement {
  if (row.type === "switch" || row.closed) {
    const choices = row.type === "switch" ? ["on", "off"] : row.choices;
    const options = choices.map((choice) => element("option", { value: choice }, choice));
    return element("select", attributes, element("option", { value: "" }, byDefault(row)), ...options);
  }
  const list: Attributes = row.choices.length ? { list: `o-${row.name}-list` } : {};
  const mode: Attributes = row.type === "number" ? { inputmode: "decimal" } : {};
  return element("input", { ...TYPED, ...mode, ...list, placeholder: byDefault(row), ...attributes });
}

/** The default that the help names, as in "Default adamw_torch_fused." */
function byDefault(row: Option): string {
  const [, words] = /Default ([\w.-]{1,24}?)[.,;]?(?: |$)/.exec(row.help) ?? [];
  return words && !["the", "a", "from", "what", "all"].includes(words) ? `${TEXTS.byDefault}: ${words}` : TEXTS.byDefault;
}

/** Moves the sliders to the settings, or to what a setting is if it is left open. */
export function moveSliders(form: HTMLFormElement): void {
  for (const slider of form.querySelectorAll<HTMLInputElement>("input[data-of]")) {
    const name = slider.dataset.of ?? "";
    const text = new FormData(form).get(name);
    const [, number, thousands] = /^\s*(\d+)(k?)\s*$/i.exec(typeof text === "string" ? text : "") ?? [];
    const value = number ? Number(number) * (thousands ? 1024 : 1) : (START[name] ?? 1);
    const values = SLIDERS[name] ?? [];
    slider.value = String(Math.max(0, values.findLastIndex((each) => each <= value)));
    slider.setAttribute("aria-valuetext", value.toLocaleString("en"));
  }
}

/** Puts a slider's value into its setting. */
export function takeFrom(slider: HTMLInputElement, form: HTMLFormElement): void {
  const value = SLIDERS[slider.dataset.of ?? ""]?.[Number(slider.value)] ?? 1;
  const control = form.elements.namedItem(slider.dataset.of ?? "");
  if (control instanceof HTMLInputElement) control.value = String(value);
  slider.setAttribute("aria-valuetext", value.toLocaleString("en"));
}

/** The question that the form has. */
export function readForm(form: HTMLFormElement, file: Question["file"]): Question {
  const entries = [...new FormData(form)].flatMap(([name, value]): [string, string][] =>
    typeof value === "string" ? [[name, value]] : [],
  );
  const { view = "estimate", ...options } = Object.fromEntries(entries);
  return { view, options: Object.fromEntries(Object.entries(options).filter(([, value]) => value !== "")), file };
}

/** Puts a question into the form; a value that a list of choices has not is added to it, so that it is not lost. */
export function fillForm(form: HTMLFormElement, question: Question): void {
  form.reset();
  for (const [name, value] of Object.entries({ view: question.view, ...question.options })) {
    const control = form.elements.namedItem(name);
    if (control instanceof HTMLSelectElement && ![...control.options].some((option) => option.value === value)) {
      control.append(element("option", { value }, value));
    }
    if (control instanceof RadioNodeList || control instanceof HTMLInputElement || control instanceof HTMLSelectElement) {
      control.value = value;
    }
    if (control instanceof HTMLElement && control.closest("#others")) control.closest("details")?.setAttribute("open", "");
  }
  moveSliders(form);
}
