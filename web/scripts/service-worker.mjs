// Writes dist/sw.js: the page's files with their digests, so that it works offline and a new version replaces them.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const web = join(dirname(fileURLToPath(import.meta.url)), "..");
const dist = join(web, "dist");
const files = readdirSync(dist, { recursive: true, withFileTypes: true })
  .filter((file) => file.isFile() && file.name !== "sw.js")
  .map((file) => join(file.parentPath, file.name).slice(dist.length + 1).replaceAll("\\", "/"))
  .sort();
const digest = createHash("sha256");
for (const file of files) digest.update(file).update(readFileSync(join(dist, file)));
const script = readFileSync(join(web, "src", "sw.js"), "utf8");
const list = JSON.stringify(["./", ...files.filter((file) => file !== "index.html")]);
writeFileSync(join(dist, "sw.js"), `const [CACHE, FILES] = ["memplan-${digest.digest("hex").slice(0, 16)}", ${list}];\n${script}`);
