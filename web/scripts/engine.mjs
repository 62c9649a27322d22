// Writes the page's engine into public/engine: Pyodide, memplan and its run-time dependencies, compiled by the
// interpreter that will run them, and what the engine says of itself: the form, and the answer to the first question.
import { execFileSync } from "node:child_process";
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { setFlagsFromString } from "node:v8";
import { crc32, gunzipSync, gzipSync } from "node:zlib";
import { commands } from "@yowasp/clang";
import { loadPyodide } from "pyodide";

const web = join(dirname(fileURLToPath(import.meta.url)), "..");
const [wheels, engine, pyodide] = ["build/wheels", "public/engine", "node_modules/pyodide"].map((path) => join(web, path));
const python = process.env.PYTHON ?? "python3";
const BROWSER = ["--platform", "pyemscripten_2026_0_wasm32", "--implementation", "cp", "--python-version", "3.14"];
const RUNTIME = ["pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm"];
const ARCHIVES = ["stdlib", "memplan", "others"];
const FIRST = ["qwen2-7b", "--method=qlora", "--gpu=3090", "--format=html"]; // FIRST of src/question.ts

function pip(...words) {
  // The wheel's compiled allocator would be this machine's: without a compiler it has Python alone.
  const env = { ...process.env, CC: "false" };
  execFileSync(python, ["-m", "pip", ...words, "--quiet", "--disable-pip-version-check"], { env, stdio: "inherit" });
}

rmSync(wheels, { recursive: true, force: true });
rmSync(engine, { recursive: true, force: true });
mkdirSync(engine, { recursive: true });
const pinned = readFileSync(join(web, "requirements.txt"), "utf8").match(/^\w+==[\d.]+$/gm);
const yaml = pinned.filter((name) => name.startsWith("PyYAML")); // of any platform, for its Python
pip("wheel", "--no-deps", "--wheel-dir", wheels, join(web, ".."), ...yaml);
pip("download", "--only-binary", ":all:", ...BROWSER, "--dest", wheels, ...pinned.filter((name) => !yaml.includes(name)));

/** Puts the allocator of native.c into the package, as a module that Pyodide's ctypes loads. */
async function compileAllocator(into) {
  const source = readFileSync(join(web, "..", "memplan", "engine", "native.c"));
  const options = { fetchProgress: null };
  const object = ["--target=wasm32-wasip1", "-O2", "-fPIC", "-c", "native.c"];
  const linked = ["-shared", "--experimental-pic", "--unresolved-symbols=import-dynamic", "--export-all", "-s", "-o", "native.lib", "native.o"];
  setFlagsFromString("--liftoff-only"); // LLVM is 100 MB, and runs too briefly to be worth V8's second compiler
  const compiled = await commands.clang(object, { "native.c": new Uint8Array(source) }, options);
  const library = await commands["wasm-ld"](linked, compiled, options);
  setFlagsFromString("--no-liftoff-only");
  // by the name that memplan/engine/native.py looks for
  into.FS.writeFile(`/site/memplan/engine/native-${crc32(source).toString(16).padStart(8, "0")}.lib`, library["native.lib"]);
}

const interpreter = await loadPyodide();
const unpack = (into, path, extractDir) =>
  into.unpackArchive(new Uint8Array(readFileSync(path)).buffer, "zip", { extractDir });
unpack(interpreter, join(pyodide, "python_stdlib.zip"), "/stdlib");
for (const wheel of readdirSync(wheels)) unpack(interpreter, join(wheels, wheel), "/site");
await compileAllocator(interpreter);
interpreter.runPython(readFileSync(join(web, "scripts", "archives.py"), "utf8"));
for (const name of ARCHIVES) {
  writeFileSync(join(engine, `${name}.bin`), gzipSync(interpreter.FS.readFile(`/${name}.archive`), { level: 9 }));
}
for (const name of RUNTIME) cpSync(join(pyodide, name), join(engine, name));

// What the page shows before its engine has started, from the engine as the browser will start it.
const { start } = await import("../src/start.mjs");
const stdlib = join(web, "build", "stdlib.zip");
const located = (archive) => (writeFileSync(stdlib, archive), stdlib);
const ready = await start(async (name) => gunzipSync(readFileSync(join(engine, `${name}.bin`))), located, loadPyodide);
await ready.others();
const { code, out, err } = JSON.parse(ready.answer(JSON.stringify({ words: FIRST, files: {} })));
if (code !== 0) throw new Error(err);
const form = ready.form();
writeFileSync(join(engine, "form.json"), form);
writeFileSync(join(web, "build", "first.html"), out);
writeFileSync(join(engine, "engine.json"), JSON.stringify({ engine: "browser", version: JSON.parse(form).version }));
