import { existsSync, readFileSync } from "node:fs";
import { defineConfig, type Plugin } from "vitest/config";
import { TEXTS } from "./src/texts.ts";

const read = (path: string) => readFileSync(new URL(path, import.meta.url), "utf8");

/** The script of memplan's own pages as a function, to run again for each answer. */
const timeline: Plugin = {
  name: "timeline",
  resolveId: (id) => (id === "virtual:timeline" ? id : null),
  load: (id) =>
    id === "virtual:timeline"
      ? `export default function drawTimelines() {\n${read("../memplan/report/style/page.js")}\n}`
      : null,
};

/** The texts, and the answer to the first question as the engine gave it when it was built. */
const firstAnswer: Plugin = {
  name: "first-answer",
  transformIndexHtml: (html) => {
    const path = new URL("build/first.html", import.meta.url);
    if (!existsSync(path)) throw new Error("no engine: run npm run engine");
    const report = readFileSync(path, "utf8");
    const [, header, main] = /<header>(.*?)<pre class="command">.*?<main>(.*)<\/main>/s.exec(report) ?? [];
    if (header === undefined || main === undefined) throw new Error("the engine's page has another form");
    return html
      .replace("<!--first answer-->", () => header + main)
      .replaceAll(/%(\w+)%/g, (whole, name: string) => {
        const text = (TEXTS as Record<string, unknown>)[name];
        return typeof text === "string" ? text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll('"', "&quot;") : whole;
      });
  },
};

export default defineConfig({
  base: "./",
  plugins: [timeline, firstAnswer],
  worker: { format: "es" },
  build: { target: "es2022", modulePreload: false, assetsInlineLimit: 0 },
  // Two at a time also on two cores, of which vitest would leave one idle.
  test: { include: ["tests/**/*.test.ts"], testTimeout: 300_000, hookTimeout: 120_000, maxWorkers: 2 },
});
