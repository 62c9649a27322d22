import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { commandLine, fileName, FIRST, fragment, fromFragment, nameOf, words, type Question } from "../src/question";

const NAMES = new Set(["model", "method", "gpu", "seq_len", "padded", "targets"]);
const VIEWS = ["estimate", "fit"];

test("the first question is the one that the engine answers when the page is built", () => {
  const script = readFileSync(new URL("../scripts/engine.mjs", import.meta.url), "utf8");
  const built: unknown = JSON.parse(/^const FIRST = (\[.*?\]);/m.exec(script)?.[1] ?? "");
  expect([...words(FIRST), "--format=html"]).toEqual(built);
});

test("a question's words have each value with its option, and no empty one", () => {
  const question: Question = {
    view: "fit",
    options: { model: " gpt2 ", seq_len: "4k", padded: "on", method: "", gpu: "3090" },
    file: null,
  };
  expect(words(question)).toEqual(["fit", "gpt2", "--seq-len=4k", "--padded", "--gpu=3090"]);
  expect(words({ ...question, options: { padded: "off" } })).toEqual(["fit", "--no-padded"]);
});

test("a command line is quoted as a shell reads it", () => {
  const options = { model: "it's", targets: ".*\n$(x)" };
  expect(commandLine({ view: "estimate", options, file: null })).toBe(`memplan 'it'"'"'s' --targets '.*\n$(x)'`);
});

describe("a fragment", () => {
  const questions: Question[] = [
    FIRST,
    { view: "fit", options: { model: "a b&c=d#e%", targets: "é<script>\n+" }, file: null },
    { view: "estimate", options: { model: "run.yaml" }, file: { name: "run.yaml", text: "a: 1\n# b & c: 'd'\n" } },
  ];
  test.each(questions)("holds the question and the version: $options.model", (question) => {
    const found = fromFragment(fragment(question, "1.2.3"), VIEWS, NAMES);
    expect(found).toEqual({ question, version: "1.2.3", unknown: [] });
  });
  test("without a question is none", () => {
    expect(["", "#", "#%%%", "#memplan=1"].map((text) => fromFragment(text, VIEWS, NAMES))).toEqual([null, null, null, null]);
  });
  test("that was tampered with names what is unknown, and keeps the rest", () => {
    const found = fromFragment("#model=gpt2&output=/etc/passwd&__proto__=x&view=probe&file=../../a.sh&text=b", VIEWS, NAMES);
    expect(found?.unknown).toEqual(["output", "__proto__", "view=probe"]);
    expect(found?.question).toEqual({ view: "estimate", options: { model: "gpt2" }, file: { name: "a.sh", text: "b" } });
  });
});

test("a file's name has letters, digits, dots and dashes", () => {
  const names = ["C:\\runs\\my run.yaml", "../../x", "...", "<b>.json", "é.yml", "a".repeat(99)];
  expect(names.map(fileName)).toEqual(["my-run.yaml", "x", "run.yaml", "b-.json", "yml", "a".repeat(80)]);
  for (const name of names) expect(fileName(name)).toMatch(/^\w[\w.-]{0,79}$/);
});

test("a pasted text is named by its kind", () => {
  const texts = ['{"model_type": "llama"}', "base_model: x\nlora_r: 8\n", "#!/bin/bash\ntrl sft", "torchrun --nproc_per_node 2 x.py", "import trl\nx = 1"];
  expect(texts.map(nameOf)).toEqual(["config.json", "run.yaml", "run.sh", "run.sh", "run.py"]);
  expect(nameOf("RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB")).toBe("oom.log");
});

test("a log comes in addition to the run", () => {
  const options = { model: "gpt2", gpu: "t4" };
  const file = { name: "oom.log", text: "" };
  expect(words({ view: "explain", options, file })).toEqual(["explain", "oom.log", "gpt2", "--gpu=t4"]);
  expect(words({ view: "explain", options: { model: "oom.log" }, file })).toEqual(["explain", "oom.log"]);
});
