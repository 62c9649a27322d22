import "../../memplan/report/style/palette.css";
import "../../memplan/report/style/page.css";
import "./page.css";
import { engine as findEngine, type Answer, type Engine, type Form } from "./engine";
import { drawForm, element, fillForm, moveSliders, readForm, takeFrom } from "./form";
import * as asked from "./question";
import { equip, picture, save, showPart, showReport, showSummary } from "./result";
import { TEXTS } from "./texts";

const PATIENCE = 200; // milliseconds after the last key of a text

function part(id: string): HTMLElement {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no #${id}`);
  return found;
}

const form = part("question") as HTMLFormElement;
const [report, status, problem, notice] = [part("report"), part("status"), part("problem"), part("notice")];
let file: asked.Question["file"] = null;
let [engine, described]: [Engine | null, Form | null] = [null, null];
let [isAsking, isWaiting] = [false, false];
let [isFollowing, hasMoved] = [false, false]; // the sliders

function tell(place: HTMLElement, text: string): void {
  place.textContent = text;
  place.hidden = text === "";
}

function files(question: asked.Question): Record<string, string> {
  const used = question.file && (question.options.model === question.file.name || asked.hasLog(question)) ? question.file : null;
  return used ? { [used.name]: used.text } : {};
}

async function ask(format: string): Promise<Answer> {
  if (!engine) throw new Error(TEXTS.starting);
  const question = readForm(form, file);
  const withLines = question.view === "fit" && format === "html" ? ["--explain"] : []; // lines to paste
  return engine.ask([...asked.words(question), `--format=${format}`, ...withLines], files(question));
}

/** Asks for a part of the page about the form's run. */
async function askPart(part: string): Promise<Answer> {
  const question = { ...readForm(form, file), view: "estimate" };
  if (!engine) throw new Error(TEXTS.starting);
  return engine.ask(asked.words(question), files(question), part);
}

/** Shows the verdict and the bar while a slider moves; the last place of several is shown. */
async function follow(): Promise<void> {
  hasMoved = true;
  if (isFollowing || isAsking || readForm(form, file).view !== "estimate") return;
  isFollowing = true;
  while (hasMoved) {
    hasMoved = false;
    const { code, out } = await askPart("bar");
    if (code < 2) showSummary(report, out);
    showVerdict();
    part("command").textContent = asked.commandLine(readForm(form, file));
  }
  isFollowing = false;
}

/** Fills the parts below the answer that are open. */
async function showMore(): Promise<void> {
  const question = readForm(form, file);
  const about = JSON.stringify([asked.words({ ...question, view: "estimate" }), question.file?.text ?? ""]);
  part("more").hidden = question.view === "explain";
  for (const fold of part("more").querySelectorAll<HTMLDetailsElement>("details[open]")) {
    const place = fold.querySelector("div");
    if (!place || fold.dataset.about === about) continue;
    fold.dataset.about = about;
    place.setAttribute("aria-busy", "true");
    const { code, out, err } = await askPart(fold.dataset.part ?? "");
    place.removeAttribute("aria-busy");
    if (code > 1) place.replaceChildren(element("p", {}, err.trim().replace(/^memplan: /, "")));
    else showPart(place, out, (...names) => { choose(fold.dataset.part ?? "", names); });
  }
}

/** Puts what was chosen in a part of the page into the form. */
function choose(part: string, names: readonly string[]): void {
  const settings = { map: ["batch_size", "seq_len"], cards: ["gpu"], stacks: ["profile"] }[part] ?? [];
  const question = readForm(form, file);
  fillForm(form, { ...question, options: { ...question.options, ...Object.fromEntries(settings.map((name, n) => [name, names[n] ?? ""])) } });
  void update();
}

/** Draws the folds of the parts, which are asked for once they are open. */
function drawMore(): void {
  const folds = Object.entries(TEXTS.more).map(([name, title]) => {
    const fold = element("details", { "data-part": name }, element("summary", {}, title), element("div"));
    fold.addEventListener("toggle", () => void showMore());
    return fold;
  });
  part("more").replaceChildren(...folds);
  part("more").hidden = false;
}

/** Asks the form's question, and once more if it changes meanwhile. */
async function update(): Promise<void> {
  const question = readForm(form, file);
  part("command").textContent = asked.commandLine(question);
  part("png").hidden = question.view !== "estimate";
  if (!engine) return;
  if (isAsking) {
    isWaiting = true;
    return;
  }
  isAsking = true;
  const slow = setTimeout(() => { tell(status, TEXTS.computing); report.setAttribute("aria-busy", "true"); }, 300);
  const start = performance.now();
  try {
    const { code, out, err } = await ask("html");
    const failed = code > 1 || !out;
    const line = err.trim().replace(/^memplan: /, "");
    tell(problem, failed ? line + (code === 3 ? ` ${TEXTS.noFacts}` : "") : "");
    if (!failed) {
      showReport(report, out);
      history.replaceState(null, "", asked.fragment(question, engine.version));
    }
    report.classList.toggle("stale", failed);
    report.classList.remove("earlier");
    offerHub(code === 3 ? (question.options.model ?? "") : "");
    tell(status, failed ? TEXTS.stale : TEXTS.computed[engine.kind]((performance.now() - start) / 1000));
    showVerdict();
  } catch (error) {
    tell(problem, TEXTS.failed + String(error instanceof Error ? error.message : error));
    tell(status, "");
  }
  clearTimeout(slow);
  report.removeAttribute("aria-busy");
  report.dataset.answered = String(Number(report.dataset.answered ?? 0) + 1);
  isAsking = false;
  if (isWaiting) {
    isWaiting = false;
    await update();
  } else void showMore();
}

/** Offers to ask the Hub for a model's config.json: the only request to another host, and only after a click. */
function offerHub(model: string): void {
  const id = /^[\w-][\w.-]*\/[\w-][\w.-]*$/.test(model.trim()) ? model.trim() : "";
  tell(part("hub"), id && TEXTS.hub(id));
  part("hub").onclick = () => void askHub(id);
}

async function askHub(id: string): Promise<void> {
  try {
    const quiet = { credentials: "omit", referrerPolicy: "no-referrer" } as const;
    const response = await fetch(`https://huggingface.co/${id}/resolve/main/config.json`, quiet);
    if (!response.ok) throw new Error(String(response.status));
    await read(new File([await response.blob()], `${id.replace("/", "-")}.json`));
    tell(part("hub"), "");
  } catch (error) {
    tell(problem, TEXTS.hubFailed(id, error instanceof Error ? error.message : String(error)));
  }
}

/** Shows the verdict at the foot of a narrow screen, where the form hides it. */
function showVerdict(): void {
  const title = report.querySelector("h1");
  part("verdict").textContent = problem.textContent || (title?.textContent ?? "");
  part("verdict").className = problem.textContent ? "nofit" : (title?.className ?? "");
}

/** Reads the question of the page's address. */
function readAddress(): void {
  const names = new Set(["model", ...Object.values(described?.headings ?? {}).flat().map((row) => row.name)]);
  const found = asked.fromFragment(location.hash, described?.views ?? [], names);
  const own = described?.version ?? "";
  const notes = found
    ? [
        ...(found.version && found.version !== own ? [TEXTS.otherVersion(found.version.slice(0, 40), own)] : []),
        ...(found.unknown.length ? [TEXTS.unknown(found.unknown.map((name) => name.slice(0, 40)).slice(0, 8))] : []),
      ]
    : [];
  tell(notice, notes.join(" "));
  const question = found?.question ?? asked.FIRST;
  setFile(question.file);
  fillForm(form, question);
}

function setFile(next: asked.Question["file"]): void {
  file = next;
  tell(part("file-used"), next ? (asked.isLog(next.name) ? TEXTS.logUsed : TEXTS.fileUsed)(next.name) : "");
  part("file-remove").hidden = next === null;
}

function use(name: string, text: string): void {
  if (!text.trim()) {
    tell(problem, TEXTS.fileEmpty);
    return;
  }
  const next = { name: asked.fileName(name), text };
  setFile(next);
  const question = readForm(form, file);
  const change = asked.isLog(next.name) ? { view: "explain" } : { options: { ...question.options, model: next.name } };
  fillForm(form, { ...question, ...change });
  void update();
}

async function read(chosen: File): Promise<void> {
  if (chosen.size > asked.LARGEST_FILE) {
    tell(problem, TEXTS.fileTooLarge(chosen.name, chosen.size));
    return;
  }
  try {
    use(chosen.name, await chosen.text());
  } catch {
    tell(problem, TEXTS.fileUnreadable(chosen.name));
  }
}

function listen(): void {
  let later: ReturnType<typeof setTimeout> | undefined;
  form.addEventListener("input", (event) => {
    const slides = event.target instanceof HTMLInputElement && event.target.dataset.of !== undefined;
    if (!(event.target instanceof HTMLElement) || !(slides || event.target.hasAttribute("name"))) return; // a file, not a setting
    const typed = slides || (event.target instanceof HTMLInputElement && event.target.type === "text");
    if (slides) { takeFrom(event.target, form); void follow(); } else moveSliders(form);
    part("verdict").hidden = false; // once the form is used
    clearTimeout(later);
    later = setTimeout(() => void update(), typed ? PATIENCE : 0);
  });
  form.addEventListener("submit", (event) => { event.preventDefault(); void update(); });
  addEventListener("hashchange", () => { readAddress(); void update(); });
  for (const name of ["dragover", "drop"] as const) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      const dropped = name === "drop" ? event.dataTransfer?.files[0] : undefined;
      if (dropped) void read(dropped);
    });
  }
  const chooser = part("file") as HTMLInputElement;
  chooser.addEventListener("change", () => { const [chosen] = chooser.files ?? []; if (chosen) void read(chosen); chooser.value = ""; });
  const pasted = part("pasted") as HTMLTextAreaElement;
  part("paste").addEventListener("click", () => { use(asked.nameOf(pasted.value), pasted.value); });
  part("file-remove").addEventListener("click", () => {
    const name = file?.name;
    setFile(null);
    const question = readForm(form, null);
    if (question.view === "explain") fillForm(form, { ...question, view: "estimate" });
    if (question.options.model === name) fillForm(form, { ...question, options: { ...question.options, model: asked.FIRST.options.model ?? "" } });
    void update();
  });
  part("verdict").addEventListener("click", () => { report.scrollIntoView(); });
  const copies = { copy: () => part("command").textContent, link: () => location.href };
  for (const [id, text] of Object.entries(copies)) {
    part(id).addEventListener("click", () => void navigator.clipboard.writeText(text()).then(() => { tell(status, TEXTS.copied); }));
  }
  part("json").addEventListener("click", () => void ask("json").then(({ out }) => { save("memplan.json", new Blob([out])); }));
  part("png").addEventListener("click", () => void ask("svg").then(async ({ out }) => { save("memplan.png", await picture(out)); }));
}

async function begin(): Promise<void> {
  part("no-script").remove();
  equip(report);
  showVerdict();
  tell(status, TEXTS.starting);
  const found = await findEngine();
  described = found.form;
  drawForm(part("fields"), found.form);
  drawMore();
  readAddress();
  listen();
  engine = found.engine;
  part("version").textContent = engine.version;
  await update();
  if (engine.kind === "browser" && "serviceWorker" in navigator && import.meta.env.PROD) {
    await navigator.serviceWorker.register("sw.js");
  }
}

begin().catch((error: unknown) => {
  tell(problem, TEXTS.failed + String(error instanceof Error ? error.message : error));
  part("fields").append(element("p", {}, TEXTS.failed));
});
