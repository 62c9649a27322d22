// memplan in this worker. The first answer needs no other package; the others are unpacked once it is there, or before a
// question whose words may be wrong or that names a file.
import { start } from "./start.mjs";

interface Asked {
  id: number;
  question: string;
}

const INDEX = new URL("../engine/", import.meta.url).href;

async function bytes(name: string): Promise<Uint8Array> {
  const response = await fetch(`${INDEX}${name}.bin`);
  if (!response.ok || !response.body) throw new Error(`${name}: ${String(response.status)}`);
  return new Uint8Array(await new Response(response.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
}

// Pyodide compiles the interpreter after all else has come; here it is compiled while the rest is on its way.
const compiled = WebAssembly.compileStreaming(fetch(`${INDEX}pyodide.asm.wasm`));
WebAssembly.instantiateStreaming = async (_: unknown, imports?: WebAssembly.Imports) => {
  const module = await compiled;
  return { module, instance: await WebAssembly.instantiate(module, imports) };
};
void import(/* @vite-ignore */ `${INDEX}pyodide.asm.mjs`);

const engine = (async () => {
  const { loadPyodide } = (await import(/* @vite-ignore */ `${INDEX}pyodide.mjs`)) as { loadPyodide: unknown };
  return start(bytes, (archive) => URL.createObjectURL(new Blob([archive as BlobPart])), loadPyodide, INDEX);
})();
let others: Promise<void> | undefined;

async function answer(question: string): Promise<unknown> {
  const { answer, others: unpackOthers } = await engine;
  const first = others === undefined;
  const parsed = JSON.parse(question) as { words: string[]; files: Record<string, string> };
  if (first && Object.keys(parsed.files).length === 0) {
    const found = JSON.parse(answer(question)) as { code: number };
    others = unpackOthers();
    if (found.code < 2) return found;
  }
  await (others ??= unpackOthers());
  return JSON.parse(answer(question));
}

let queue: Promise<unknown> = Promise.resolve();
self.onmessage = ({ data: { id, question } }: MessageEvent<Asked>) => {
  queue = queue.then(async () => {
    try {
      self.postMessage({ id, answer: await answer(question) });
    } catch (error) {
      self.postMessage({ id, error: String(error).slice(-400) });
    }
  });
};
