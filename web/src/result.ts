// An answer in the page: the parts of the report that the engine writes as HTML. Nothing in it is executed.
import drawTimelines from "virtual:timeline";
import { element } from "./form";
import { TEXTS } from "./texts";

const MOST_WITHOUT_SEARCH = 12; // rows of a table

/** Shows a report in `place`; folds that are open and searched tables stay so. */
export function showReport(place: HTMLElement, html: string): void {
  const report = new DOMParser().parseFromString(html, "text/html");
  const folds = new Map([...place.querySelectorAll("details")].map((fold, n) => [n, fold.open]));
  const searched = [...place.querySelectorAll<HTMLInputElement>("input[type=search]")].map((input) => input.value);
  const title = report.querySelectorAll("header > h1, header > p:not(.made)");
  const content = report.querySelectorAll("main > *");
  place.replaceChildren(...[...title, ...content].map((node) => document.importNode(node, true)));
  place.querySelectorAll("details").forEach((fold, n) => (fold.open = folds.get(n) ?? fold.open));
  equip(place, searched);
}

/** Shows another verdict, question and bar above a report, which is of an earlier run until the next report. */
export function showSummary(place: HTMLElement, html: string): void {
  const summary = new DOMParser().parseFromString(html, "text/html").body;
  const old = [...place.querySelectorAll(":scope > h1, :scope > h1 + p, :scope > figure:not(.timeline)")].slice(0, summary.children.length);
  if (!old.length) return;
  place.classList.add("earlier");
  old[0]?.before(...[...summary.children].map((node) => document.importNode(node, true)));
  for (const node of old) node.remove();
}

/** Shows a part of the page; what is named in the first column, or stands in a cell of a map, can be chosen. */
export function showPart(place: HTMLElement, html: string, choose: (...names: string[]) => void): void {
  const part = new DOMParser().parseFromString(html, "text/html").body;
  place.replaceChildren(...[...part.children].map((node) => document.importNode(node, true)));
  const button = (cell: Element, label: string, ...names: string[]) => {
    const made = element("button", { type: "button", "aria-label": label }, ...cell.childNodes);
    made.addEventListener("click", () => { choose(...names); });
    cell.replaceChildren(made);
  };
  const heads = [...place.querySelectorAll("table.map thead th")].map((head) => head.textContent);
  for (const row of place.querySelectorAll("tbody tr")) {
    const [first, ...others] = [...row.children];
    const name = first?.textContent ?? "";
    if (!heads.length && first) button(first, TEXTS.choose(name), name);
    if (heads.length) others.forEach((cell, n) => { button(cell, TEXTS.chooseBoth(name, heads[n + 1] ?? "", cell.textContent), name, heads[n + 1] ?? ""); });
  }
  equip(place);
}

/** Makes the timeline of a report answer the pointer, and its long tables searchable. */
export function equip(place: HTMLElement, searched: readonly string[] = []): void {
  drawTimelines();
  const tables = [...place.querySelectorAll<HTMLElement>(".scroll")].filter(
    (table) => table.querySelectorAll("tbody tr").length > MOST_WITHOUT_SEARCH && !table.querySelector(".map"),
  );
  tables.forEach((table, n) => { search(table, searched[n] ?? ""); });
}

function search(table: HTMLElement, text: string): void {
  const rows = [...table.querySelectorAll<HTMLElement>("tbody tr")];
  const input = element("input", { type: "search", autocomplete: "off", spellcheck: "false" });
  const count = element("output");
  const show = () => {
    const wanted = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const words = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => words.includes(word));
    }
    count.textContent = TEXTS.rows(rows.filter((row) => !row.hidden).length, rows.length);
  };
  input.value = text;
  input.addEventListener("input", show);
  table.before(element("p", { class: "search" }, element("label", {}, `${TEXTS.filter} `, input), " ", count));
  show();
}

/** Gives the visitor a file. */
export function save(name: string, content: Blob): void {
  const link = element("a", { href: URL.createObjectURL(content), download: name });
  link.click();
  setTimeout(() => { URL.revokeObjectURL(link.href); }, 1000);
}

/** Returns a drawing as a picture of twice its size. */
export async function picture(svg: string): Promise<Blob> {
  const image = new Image();
  image.src = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  await image.decode();
  const canvas = element("canvas", { width: String(image.width * 2), height: String(image.height * 2) });
  canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(image.src);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => { if (blob) resolve(blob); else reject(new Error("no picture")); });
  });
}
