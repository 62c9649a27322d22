// The engine behind the page: memplan in a worker of this browser, or memplan's own server. The page asks which it has.

export interface Answer {
  readonly code: number; // the command's exit code; 2 and 3 are errors, whose line is `err`
  readonly out: string;
  readonly err: string;
}

export interface Engine {
  readonly kind: "browser" | "native";
  readonly version: string;
  /** The command's answer, or a part of the page about its run: bar, map, cards or stacks. */
  ask(words: readonly string[], files: Readonly<Record<string, string>>, part?: string): Promise<Answer>;
}

export interface Option {
  readonly name: string;
  readonly help: string;
  readonly type: "switch" | "number" | "text";
  readonly choices: readonly string[];
  readonly closed: boolean;
}

export interface Form {
  readonly version: string;
  readonly views: readonly string[];
  readonly models: Readonly<Record<string, string>>;
  readonly headings: Readonly<Record<string, readonly Option[]>>;
}

const json = async (path: string): Promise<unknown> => {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${String(response.status)}`);
  return response.json();
};

export async function engine(): Promise<{ engine: Engine; form: Form }> {
  const form = json("engine/form.json");
  const { engine: kind, version } = (await json("engine/engine.json")) as { engine: "browser" | "native"; version: string };
  const ask = kind === "native" ? askServer : worker(); // which starts before the form is there
  return { engine: { kind, version, ask }, form: (await form) as Form };
}

async function askServer(words: readonly string[], files: Readonly<Record<string, string>>, part = ""): Promise<Answer> {
  const response = await fetch("engine/answer", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ words, files, part }),
  });
  if (!response.ok) throw new Error(await response.text());
  return (await response.json()) as Answer;
}

/** Starts the worker, and returns what asks it; it answers one question after the other. */
function worker(): Engine["ask"] {
  const started = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
  const waiting = new Map<number, { resolve: (answer: Answer) => void; reject: (error: Error) => void }>();
  let last = 0;
  started.onmessage = ({ data }: MessageEvent<{ id: number; answer?: Answer; error?: string }>) => {
    const asked = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.answer) asked?.resolve(data.answer);
    else asked?.reject(new Error(data.error));
  };
  started.onerror = (event) => {
    for (const { reject } of waiting.values()) reject(new Error(event.message || "worker"));
    waiting.clear();
  };
  return (words, files, part = "") =>
    new Promise((resolve, reject) => {
      waiting.set(++last, { resolve, reject });
      started.postMessage({ id: last, question: JSON.stringify({ words, files, part }) });
    });
}
