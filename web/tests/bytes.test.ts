// The browser's engine, in node, answers with the bytes of memplan in this machine's Python.
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { gunzipSync } from "node:zlib";
import { loadPyodide } from "pyodide";
import { expect, test } from "vitest";
import { start } from "../src/start.mjs";
import { DIST } from "./server";

const PYTHON = process.env.PYTHON ?? "python3"; // with memplan's dependencies
const PYTHONPATH = process.env.PYTHONPATH ?? fileURLToPath(new URL("../..", import.meta.url)); // with memplan
const MODELS = ["qwen2-7b", "llama-3.2-1b", "gpt2", "mixtral-8x7b", "bert-base-uncased", "gemma-2-2b", "t5-base", "phi-3.5-mini"];
const SETTINGS = [
  ...["--method=lora", "--method=qlora", "--method=dora --rank=64", "--method=full --optimizer=adafactor"],
  ...["--method=generate", "--method=generate --profile=vllm", "--method=full --gpus=4 --zero=3", "--method=lora --no-gradient-checkpointing"],
];
const SIZES = ["", "--batch-size=4 --seq-len=512", "--seq-len=4k"];
const RUN = "base_model: Qwen/Qwen2-7B\nadapter: lora\nlora_target_linear: true\nmicro_batch_size: 4\nsequence_len: 1024\nlearning: 1\n";
const OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4.64 GiB. GPU 0 has a total capacity of 23.68 GiB of which 1.31 GiB is free. Of the allocated memory 20.93 GiB is allocated by PyTorch, and 1.02 GiB is reserved by PyTorch but unallocated.";
const PARTS = ["bar", "map", "cards", "stacks"];
const OTHERS = [
  ...["fit llama-3.2-1b --gpu=4060ti-16gb --batch-size=32 --format=markdown", "buy gpt2 --format=html", "advise gpt2 --gpu=t4 --format=html"],
  ...["max gpt2 --gpu=t4 --method=lora --format=html", "explain oom.log qwen2-7b --gpu=3090 --method=lora --format=html"],
  ...["run.yaml --gpu=a100-40gb --format=html", "config.json --format=json", "qwen2-7b --rank=none --format=html", "qwen2-70x", ""],
];

test("two hundred runs", async () => {
  const grid = MODELS.flatMap((model) => SETTINGS.flatMap((setting) => SIZES.map((size) => `${model} ${setting} ${size} --gpu=3090 --format=json`)));
  const lines = [...grid.map((line, n) => (n % 16 ? line : line.replace("json", "html"))), ...OTHERS];
  const files = { "run.yaml": RUN, "config.json": "{", "oom.log": OOM };
  const ofParts = PARTS.map((part) => JSON.stringify({ words: ["gpt2", "--gpu=t4", "--method=lora"], files: {}, part }));
  const questions = [...lines.map((line) => JSON.stringify({ words: line.split(" ").filter(Boolean), files })), ...ofParts];
  const script = "import sys\nfrom memplan.cli.page import answer\nfor line in sys.stdin: print(answer(line))";
  const env = { ...process.env, PYTHONPATH };
  const native = spawnSync(PYTHON, ["-c", script], { input: questions.join("\n"), encoding: "utf8", env, maxBuffer: 2 ** 30 });
  expect(native.stderr).toBe("");

  const stdlib = join(mkdtempSync(join(tmpdir(), "memplan-")), "stdlib.zip");
  const located = (archive: Uint8Array) => { writeFileSync(stdlib, archive); return stdlib; };
  const bytes = (name: string) => Promise.resolve(gunzipSync(readFileSync(join(DIST, "engine", `${name}.bin`))));
  const engine = await start(bytes, located, loadPyodide);
  await engine.others();
  const expected = native.stdout.trim().split("\n");
  expect(questions.length).toBeGreaterThan(200);
  const codes = questions.map((question, n) => {
    const found = engine.answer(question);
    expect(JSON.parse(found), lines[n]).toEqual(JSON.parse(expected[n] ?? "null"));
    return (JSON.parse(found) as { code: number }).code;
  });
  expect(codes.filter((code) => code < 2).length).toBeGreaterThan(150);
});
