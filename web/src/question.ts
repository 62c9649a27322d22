// A question of the page: a command about one run, its settings, and the files that it names. Its words are the
// command line's, and its link is the fragment of the page's address.

export interface Question {
  readonly view: string;
  readonly options: Readonly<Record<string, string>>; // `model` and the command's options, by their names in the form
  readonly file: { readonly name: string; readonly text: string } | null;
}

export const FIRST: Question = {
  view: "estimate",
  options: { model: "qwen2-7b", method: "qlora", gpu: "3090" },
  file: null,
};

export const LARGEST_FILE = 2 ** 22; // bytes of a dropped or pasted file; a config or run file has a few thousand

/** Whether the file of a question is a log, which comes in addition to the run. */
export function hasLog(question: Question): boolean {
  return question.view === "explain" && question.file !== null && question.options.model !== question.file.name;
}

/** The words of the question's command, each value with its option. */
export function words(question: Question): string[] {
  const { model, ...options } = question.options;
  const named = Object.entries(options).filter(([, value]) => value.trim() !== "");
  return [
    ...(question.view === "estimate" ? [] : [question.view]),
    ...(hasLog(question) ? [question.file?.name ?? ""] : []),
    ...(model?.trim() ? [model.trim()] : []),
    ...named.map(([name, value]) => word(`--${name.replaceAll("_", "-")}`, value.trim())),
  ];
}

function word(flag: string, value: string): string {
  if (value === "on") return flag;
  return value === "off" ? `--no-${flag.slice(2)}` : `${flag}=${value}`;
}

/** The question's command as it is typed into a shell. */
export function commandLine(question: Question): string {
  const typed = words(question).flatMap((word) => {
    const [, flag, value] = /^(--[\w-]+)=(.*)$/s.exec(word) ?? [];
    return flag === undefined || value === undefined ? [word] : [flag, value];
  });
  return ["memplan", ...typed.map(quoted)].join(" ");
}

function quoted(word: string): string {
  return /^[\w./:=@,+-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;
}

/** The question as a fragment, which names the version of memplan that answered it. */
export function fragment(question: Question, version: string): string {
  const pairs = Object.entries(question.options).filter(([, value]) => value.trim() !== "");
  const view = question.view === "estimate" ? [] : [["view", question.view]];
  const file = question.file ? [["file", question.file.name], ["text", question.file.text]] : [];
  return `#${new URLSearchParams([...pairs, ...view, ...file, ["memplan", version]]).toString()}`;
}

/** A fragment's question, the version in it, and the settings that this page has not. Null if it has no question. */
export function fromFragment(
  text: string,
  views: readonly string[],
  names: ReadonlySet<string>,
): { question: Question; version: string; unknown: string[] } | null {
  const given = new URLSearchParams(text.replace(/^#/, ""));
  const special = ["view", "file", "text", "memplan"];
  const unknown = [...given.keys()].filter((name) => !special.includes(name) && !names.has(name));
  const options = Object.fromEntries([...given].filter(([name]) => names.has(name)));
  const [name, content] = [given.get("file"), given.get("text")];
  const view = given.get("view") ?? "estimate";
  if (!views.includes(view)) unknown.push(`view=${view}`);
  if (!Object.keys(options).length && name === null) return null;
  return {
    question: {
      view: views.includes(view) ? view : "estimate",
      options,
      file: name === null || content === null ? null : { name: fileName(name), text: content },
    },
    version: given.get("memplan") ?? "",
    unknown: [...new Set(unknown)],
  };
}

/** A file's name as the engine takes it: letters, digits, dots, dashes. */
export function fileName(name: string): string {
  const last = name.split(/[/\\]/).at(-1) ?? "";
  return last.replaceAll(/[^A-Za-z0-9._-]/g, "-").replace(/^[^A-Za-z0-9_]+/, "").slice(-80).replace(/^[^A-Za-z0-9_]+/, "") || "run.yaml";
}

/** Whether a file is a log by its name. */
export function isLog(name: string): boolean {
  return /\.(log|out|err|txt)$/i.test(name);
}

/** The name of a pasted text, of the kind that it shows. */
export function nameOf(text: string): string {
  const start = text.trimStart();
  if (/out of memory|OutOfMemoryError|Tried to allocate|No available memory|cannot allocate memory|failed to allocate/i.test(text)) return "oom.log";
  if (/^[{[]/.test(start)) return "config.json";
  if (/^(import|from) \w/m.test(start) && !/^\w+:/m.test(start)) return "run.py";
  return /^(#!|[A-Z_]+=|export |(torchrun|accelerate|deepspeed|axolotl|llamafactory-cli|trl|swift|python3?|vllm|sglang|llama-\w+|docker|srun)\b)/m.test(start)
    ? "run.sh"
    : "run.yaml";
}
