// The built page in headless Chromium: answers, links, files, hostile input, three widths, and no other host.
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { BrowserContext, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";
import { browser, Site } from "./server";

const AXE = readFileSync(fileURLToPath(new URL("../node_modules/axe-core/axe.min.js", import.meta.url)), "utf8");
const folder = mkdtempSync(join(tmpdir(), "memplan-page-"));
const hosts = new Set<string>();
const said: string[] = []; // errors and warnings on the console
let [site, context, page] = [null as never as Site, null as never as BrowserContext, null as never as Page];

beforeAll(async () => {
  site = await Site.start();
  context = await browser(join(folder, "profile"));
  context.on("request", (request) => hosts.add(new URL(request.url()).host));
  page = await opened("");
});

afterAll(async () => {
  await context.close();
  site.stop();
  rmSync(folder, { recursive: true, force: true });
});

async function opened(fragment: string): Promise<Page> {
  const opened = await context.newPage();
  opened.on("pageerror", (error) => said.push(error.message));
  opened.on("console", (message) => { if (message.type() !== "log") said.push(message.text()); });
  opened.on("dialog", (dialog) => { said.push(`dialog: ${dialog.message()}`); void dialog.dismiss(); });
  await opened.goto(site.url + fragment);
  await opened.waitForSelector("#report[data-answered]");
  return opened;
}

/** Does something, and waits until the page has answered. */
async function answered(act: () => Promise<unknown>): Promise<void> {
  const before = Number(await page.getAttribute("#report", "data-answered"));
  await act();
  await page.waitForFunction((n) => Number(document.getElementById("report")?.dataset.answered) > n, before);
}

const title = () => page.textContent("#report h1");

test("an answer comes from the engine in this browser", async () => {
  expect(await title()).toMatch(/^fits: 13\.\d of 23\.7 GiB used on GeForce RTX 3090/);
  expect(await page.textContent("#status")).toMatch(/^Computed in this browser/);
});

test("all files of the page have at most 9 MB compressed", async () => {
  if (!context.serviceWorkers().length) await context.waitForEvent("serviceworker");
  await page.waitForFunction(() => navigator.serviceWorker.ready.then((ready) => ready.active?.state === "activated"));
  expect(site.bytes).toBeLessThan(9e6);
  expect(site.bytes).toBeGreaterThan(7e6);
});

test("a change of the form is a new answer, its command and its link", async () => {
  await answered(() => page.fill("#o-seq_len", "16k"));
  expect(await title()).toMatch(/^does not fit/);
  expect(await page.textContent("#command")).toBe("memplan qwen2-7b --method qlora --gpu 3090 --seq-len 16k");
  expect(new URL(page.url()).hash).toMatch(/^#model=qwen2-7b&method=qlora&gpu=3090&seq_len=16k&memplan=\d/);
});

test("sequences of different lengths are answered for the longest, and say how soon it comes", async () => {
  await answered(() => page.evaluate(() => { location.hash = "#model=qwen2-7b&method=qlora&gpu=3090&lengths=p50%3D500%2Cp99%3D1000"; }));
  expect(await page.inputValue("#o-lengths")).toBe("p50=500,p99=1000");
  expect(await page.textContent("#report")).toMatch(/1 x 1,000 tokens, for which the answer holds/);
  expect(await page.textContent("#command")).toBe("memplan qwen2-7b --method qlora --gpu 3090 --lengths p50=500,p99=1000");
  await answered(() => page.evaluate(() => { location.hash = "#model=qwen2-7b&method=qlora&gpu=3090&lengths=%2Fetc%2Fpasswd"; }));
  expect(await page.textContent("#problem")).toMatch(/^--lengths: the page reads only files/);
  await answered(() => page.evaluate(() => { location.hash = "#model=qwen2-7b&method=qlora&gpu=3090&seq_len=16k"; }));
});

test("another question about the same run is one click away", async () => {
  await answered(() => page.check("input[value=fit]"));
  expect(await page.textContent("#command")).toMatch(/^memplan fit qwen2-7b/);
  expect(await page.textContent("#report")).toMatch(/saves/);
  await answered(() => page.check("input[value=estimate]"));
});

test("the timeline follows the arrow keys", async () => {
  const slider = page.locator("#report .timeline input[type=range]").first();
  await slider.focus();
  const before = await slider.getAttribute("aria-valuetext");
  await page.keyboard.press("ArrowLeft");
  expect(await slider.getAttribute("aria-valuetext")).not.toBe(before);
});

test("a slider moves the bar at once, and the answer when it rests", async () => {
  const slider = page.locator("#question input[data-of=seq_len]");
  const told = await page.evaluate(async () => {
    const slider = document.querySelector<HTMLInputElement>("#question input[data-of=seq_len]");
    const titles = new Set<string>();
    const watch = new MutationObserver(() => titles.add(document.querySelector("#report h1")?.textContent ?? ""));
    watch.observe(document.querySelector("#report") as Element, { childList: true });
    for (let n = 16; n < 26; n++) {
      if (slider) slider.value = String(n);
      slider?.dispatchEvent(new Event("input", { bubbles: true }));
      await new Promise((resolve) => setTimeout(resolve, 150));
    }
    watch.disconnect();
    return titles.size;
  });
  expect(told).toBeGreaterThan(1);
  expect(await slider.getAttribute("aria-valuetext")).toBe("9,728");
  await page.waitForFunction(() => document.querySelector("#command")?.textContent.endsWith("--seq-len 9728"));
  await page.waitForFunction(() => !document.querySelector("#report")?.classList.contains("earlier"));
  await answered(() => page.fill("#o-seq_len", "2k"));
  expect(await slider.getAttribute("aria-valuetext")).toBe("2,048");
});

test("the map, the cards and the stacks are each one click from the run", async () => {
  for (const [part, choice, command] of [["map", /^batch 2, 1k tokens: /, "--batch-size 2 --seq-len 1k"], ["cards", "Use l4", "--gpu l4"], ["stacks", /^Use unsloth/, "--profile unsloth"]] as const) {
    await page.locator(`#more details[data-part=${part}] summary`).click();
    await answered(() => page.getByRole("button", { name: choice }).first().click());
    expect(await page.textContent("#command")).toContain(command);
    await page.locator(`#more details[data-part=${part}] summary`).click();
  }
  await answered(() => page.evaluate(() => { location.hash = "#model=qwen2-7b&method=qlora&gpu=3090"; }));
});

test("the ledger is searched, and stays open and searched", async () => {
  await page.locator("#report summary", { hasText: "Every tensor" }).click();
  const search = page.locator("#report details input[type=search]").last();
  await search.fill("lm_head weight");
  const shown = page.locator("#report details").last().locator("tbody tr:visible");
  const all = await shown.count();
  expect(all).toBeGreaterThan(0);
  expect((await shown.allTextContents()).every((text) => text.includes("lm_head"))).toBe(true);
  await answered(() => page.fill("#o-seq_len", "4096"));
  expect(await shown.count()).toBe(all);
});

test("a value that is none is one line, and what was typed stays", async () => {
  await answered(() => page.fill("#o-batch_size", "many"));
  expect(await page.textContent("#problem")).toBe("--batch-size: must be a whole number, not 'many'");
  expect(await page.inputValue("#o-batch_size")).toBe("many");
  expect(await page.textContent("#status")).toBe("The answer below is that of the run before.");
  await answered(() => page.fill("#o-batch_size", "2"));
  expect(await page.isHidden("#problem")).toBe(true);
});

test("a run's file is read in place of a model, and so is a pasted one", async () => {
  const run = "base_model: Qwen/Qwen2-7B\nadapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nsequence_len: 2048\nmicro_batch_size: 1\nlora_r: 32\n";
  await answered(() => page.evaluate(() => { location.hash = "#model=gpt2&gpu=3090"; }));
  await page.locator("details.file summary").click();
  await answered(() => page.setInputFiles("#file", { name: "my run.yaml", mimeType: "text/yaml", buffer: Buffer.from(run) }));
  expect(await page.textContent("#problem")).toBe("");
  expect(await page.textContent("#report")).toMatch(/rank 32/);
  expect(await page.textContent("#command")).toBe("memplan my-run.yaml --gpu 3090");
  await page.fill("#pasted", run.replace("32", "64"));
  await answered(() => page.click("#paste"));
  expect(await page.textContent("#report")).toMatch(/rank 64/);
});

test("a pasted out-of-memory message is explained", async () => {
  await answered(() => page.evaluate(() => { location.hash = "#model=qwen2-7b&method=qlora&gpu=3090"; }));
  await page.fill("#pasted", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4.64 GiB. GPU 0 has a total capacity of 23.68 GiB of which 1.31 GiB is free.");
  await answered(() => page.click("#paste"));
  expect(await title()).toMatch(/^Out of memory \(torch, GPU\).*request 4\.64 GiB/);
  expect(await page.textContent("#command")).toBe("memplan explain oom.log qwen2-7b --method qlora --gpu 3090");
  expect(await page.textContent("#report")).toContain("logits");
  await answered(() => page.click("#file-remove"));
  expect(await title()).toMatch(/^fits/);
});

test("the Hub is asked for a config.json after a click, and not before", async () => {
  const config = { model_type: "llama", architectures: ["LlamaForCausalLM"], hidden_size: 512, intermediate_size: 1024, num_hidden_layers: 2, num_attention_heads: 8, vocab_size: 1000 };
  const asked: string[] = [];
  await context.route("https://huggingface.co/**", (route) => {
    asked.push(route.request().url());
    return route.fulfill({ json: config, headers: { "Access-Control-Allow-Origin": "*" } });
  });
  await answered(() => page.fill("#o-model", "someone/no-card"));
  expect(await page.textContent("#problem")).toContain("someone/no-card");
  expect(asked).toEqual([]);
  await answered(() => page.click("#hub"));
  expect(asked).toEqual(["https://huggingface.co/someone/no-card/resolve/main/config.json"]);
  expect(await page.textContent("#command")).toContain("memplan someone-no-card.json");
  expect(await title()).toMatch(/^fits/);
  expect(await page.isHidden("#hub")).toBe(true);
  hosts.delete("huggingface.co");
});

test("hostile input is one line of text", async () => {
  await page.fill("#pasted", "{not JSON <img src=x onerror=alert(1)>");
  await answered(() => page.click("#paste"));
  expect(await page.textContent("#problem")).toMatch(/^config\.json: not JSON/);
  const script = "<script>alert(1)</script><img src=x onerror=alert(2)>";
  await answered(() => page.fill("#o-model", script));
  expect(await page.textContent("#problem")).toContain("<script>alert(1)");
  const tampered = `#${new URLSearchParams({ model: "gpt2", gpu: script, output: script, view: script, memplan: script }).toString()}`;
  await answered(() => page.evaluate((hash) => { location.hash = hash; }, tampered));
  expect(await page.textContent("#notice")).toMatch(/^The link was made with memplan <script>.*settings.*output/);
  expect(await page.inputValue("#o-gpu")).toBe(script);
  expect(await page.textContent("#problem")).toMatch(/unknown name '<script>/);
  await page.evaluate((text) => {
    const files = new DataTransfer();
    files.items.add(new File([text.repeat(2 ** 20)], "big.json"));
    document.dispatchEvent(new DragEvent("drop", { dataTransfer: files }));
  }, "12345");
  expect(await page.textContent("#problem")).toBe("big.json: has 5 MiB; a config or a run's file has at most 4 MiB");
  expect(await page.locator("#report img, #report script:not([type])").count()).toBe(0);
  await answered(() => page.evaluate(() => { location.hash = "#model=qwen2-7b&method=qlora&gpu=3090"; }));
});

test.each([[375, "dark"], [768, "light"], [1280, "dark"]] as const)("at %i pixels, %s, it is accessible and nothing sticks out", async (width, scheme) => {
  await page.setViewportSize({ width, height: 900 });
  await page.emulateMedia({ colorScheme: scheme });
  await page.evaluate(AXE);
  const found = await page.evaluate(async () => {
    const { violations } = await (globalThis as unknown as { axe: { run: () => Promise<{ violations: { id: string; nodes: { html: string }[] }[] }> } }).axe.run();
    return violations.map(({ id, nodes }) => `${id}: ${nodes[0]?.html ?? ""}`);
  });
  expect(found).toEqual([]);
  expect(await page.evaluate(() => document.documentElement.scrollWidth - innerWidth)).toBeLessThanOrEqual(0);
});

test("a link gives the same answer again, after the first visit also without a network", async () => {
  await answered(() => page.evaluate(() => { location.hash = "#model=gpt2&method=lora&gpu=4090"; }));
  await answered(() => page.fill("#o-batch_size", "2"));
  site.stop();
  const again = await opened(new URL(page.url()).hash);
  expect(await again.textContent("#report h1")).toMatch(/^fits/);
  expect(await again.textContent("#report h1")).toBe(await title());
  expect(await again.textContent("#command")).toBe(await page.textContent("#command"));
  expect(await again.isHidden("#notice")).toBe(true);
  await again.close();
});

test("no other host was asked, and nothing was said on the console", () => {
  expect([...hosts].filter(Boolean)).toEqual([new URL(site.url).host]);
  expect(said).toEqual([]);
});
