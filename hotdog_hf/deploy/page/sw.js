// The service worker: keeps a copy of the page, so that it works offline after the first visit.

const PREFIX = `hotdog_hf ${registration.scope} `;
const NAME = PREFIX + location.search; // the version of the page, which also makes the browser update

addEventListener("install", (event) => event.waitUntil(store()));
addEventListener("activate", (event) => event.waitUntil(replaceOthers()));
addEventListener("fetch", (event) => event.respondWith(answer(event.request)));

async function store() {
  const { files } = await (await fetch("model.json", { cache: "no-cache" })).json();
  const names = ["./", "model.json", ...Object.values(files).flat()];
  const cache = await caches.open(NAME);
  await cache.addAll(names.map((name) => new Request(name, { cache: "no-cache" })));
  await skipWaiting();
}

async function replaceOthers() {
  const others = (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== NAME);
  await Promise.all(others.map((name) => caches.delete(name)));
  await clients.claim();
}

// The large files have their version in their address: the copy is as good. The others come from the
// network if there is one, so that a new model or page is seen at once.
async function answer(request) {
  const copy = await caches.match(request, { cacheName: NAME });
  if (copy && new URL(request.url).search) return copy;
  return fetch(request).catch(() => copy ?? Response.error());
}
