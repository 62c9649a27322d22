// Starts the engine: Python, and memplan in it. The same in the worker and when the page is built.
const SITE = "/lib/python3.14/site-packages";
const ABI = { abi_version: "2026_0", arch: "wasm32", platform: "emscripten_5_0_3", python: "3.14.2" };

/**
 * `bytes` returns an archive of public/engine by its name, and `located` where Python reads one that is in memory.
 *
 * @param {(name: string) => Promise<Uint8Array>} bytes
 * @param {(archive: Uint8Array) => string} located
 * @param {any} loadPyodide
 * @param {string} [indexURL]
 */
export async function start(bytes, located, loadPyodide, indexURL) {
  const [memplan, stdlib] = ["memplan", "stdlib"].map(bytes); // on their way while Python starts
  const python = await loadPyodide({
    ...(indexURL ? { indexURL, packageBaseUrl: indexURL } : {}),
    stdLibURL: located(await stdlib),
    lockFileContents: { info: ABI, packages: {} },
  });
  const unpack = (/** @type {Uint8Array} */ archive) => {
    const folders = new Set();
    let at = archive.indexOf(10) + 1; // after a line with the files' sizes
    for (const [name, size] of Object.entries(JSON.parse(new TextDecoder().decode(archive.subarray(0, at))))) {
      const path = `${SITE}/${name}`;
      const folder = path.slice(0, path.lastIndexOf("/"));
      if (!folders.has(folder)) python.FS.mkdirTree(folder);
      folders.add(folder);
      python.FS.writeFile(path, archive.subarray(at, (at += size)));
    }
    python.pyimport("importlib").invalidate_caches();
  };
  unpack(await memplan);
  const page = python.pyimport("memplan.cli.page");
  return {
    answer: (/** @type {string} */ question) => /** @type {string} */ (page.answer(question)),
    form: () => /** @type {string} */ (python.runPython("import json; from memplan.cli.page import form; json.dumps(form())")),
    others: async () => {
      unpack(await bytes("others"));
    },
  };
}
