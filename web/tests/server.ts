// A static server of the built page on a free port, as any host of files is, and a browser that reaches nothing else.
import { readFileSync, statSync } from "node:fs";
import { createServer, type Server } from "node:http";
import { extname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { chromium, type BrowserContext } from "playwright-core";

export const DIST = fileURLToPath(new URL("../dist", import.meta.url));
const TYPES: Record<string, string> = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".css": "text/css",
  ".wasm": "application/wasm",
  ".json": "application/json",
};

export class Site {
  private constructor(
    private readonly server: Server,
    readonly url: string,
    private readonly compressed: ReadonlyMap<string, Buffer>,
  ) {}

  /** The bytes of every file that was asked for, each once, compressed. */
  get bytes(): number {
    return [...this.compressed.values()].reduce((sum, body) => sum + body.length, 0);
  }

  static async start(): Promise<Site> {
    const compressed = new Map<string, Buffer>();
    const server = createServer((request, response) => {
      const path = join(DIST, request.url === "/" ? "index.html" : (request.url ?? "").replace(/\?.*/, ""));
      const type = TYPES[extname(path)];
      if (!statSync(path, { throwIfNoEntry: false })?.isFile()) {
        response.writeHead(404).end();
        return;
      }
      const body = compressed.get(path) ?? (type ? gzipSync(readFileSync(path), { level: 9 }) : readFileSync(path));
      compressed.set(path, body);
      const encoding = type ? { "Content-Encoding": "gzip" } : {};
      // "no-store", so that what answers without a network is the service worker
      response.writeHead(200, { "Content-Type": type ?? "application/octet-stream", "Cache-Control": "no-store", ...encoding });
      response.end(body);
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const address = server.address();
    const port = typeof address === "object" ? address?.port : 0;
    return new Site(server, `http://127.0.0.1:${String(port)}/`, compressed);
  }

  stop(): void {
    this.server.close();
    this.server.closeAllConnections();
  }
}

/** A browser with a profile of its own, whose names other than loopback's lead nowhere. */
export function browser(profile = ""): Promise<BrowserContext> {
  return chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"],
    viewport: { width: 1280, height: 900 },
  });
}
