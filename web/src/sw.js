// Keeps this version's files, and answers from them. CACHE and FILES are written before this text when the page is built.
/* global CACHE, FILES */
const urls = new Set(FILES.map((file) => new URL(file, self.location.href).href));

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)).then(() => self.skipWaiting()));
});
self.addEventListener("activate", (event) => {
  const old = caches.keys().then((keys) => keys.filter((key) => key.startsWith("memplan-") && key !== CACHE));
  event.waitUntil(old.then((keys) => Promise.all(keys.map((key) => caches.delete(key)))).then(() => self.clients.claim()));
});
self.addEventListener("fetch", (event) => {
  const url = event.request.url.split("#")[0];
  if (event.request.method !== "GET" || !urls.has(url)) return;
  event.respondWith(caches.open(CACHE).then(async (cache) => (await cache.match(url)) ?? fetch(event.request)));
});
