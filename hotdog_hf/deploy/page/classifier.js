// A worker, so that the page stays responsive: decodes photos as hotdog_hf.data.images.decode_image does,
// and runs the model, which resizes and normalises them itself.

import * as ort from "./ort.wasm.bundle.min.mjs";

const MAX_PIXELS = 89_478_485; // as Pillow's limit
const ROWS = 256; // read at a time: phones limit the size of a canvas

const session = load();
session.then(() => postMessage({}), (error) => postMessage({ problem: error.message }));
let queue = session.catch(() => null); // one photo at a time

onmessage = ({ data: { number, file } }) => {
  queue = queue.then(async () => {
    try {
      postMessage({ number, ...await classify(file) });
    } catch (error) {
      postMessage({ number, problem: error.message });
    }
  });
};

async function load() {
  const { files } = JSON.parse(new TextDecoder().decode(await download("model.json")));
  const [model, runtime] = await Promise.all([files.model, files.runtime].map(download));
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  ort.env.wasm.wasmBinary = await unpacked(runtime);
  return ort.InferenceSession.create(new Uint8Array(model));
}

async function download(name) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}

async function unpacked(bytes) {
  const [first, second] = new Uint8Array(bytes, 0, 2);
  if (first !== 0x1f || second !== 0x8b) return bytes; // a server that unpacks .gz files itself
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function classify(file) {
  const { rgb, height, width } = await decode(file);
  const image = new ort.Tensor("uint8", rgb, [height, width, 3]);
  const { probabilities, distance } = await (await session).run({ image });
  return { probabilities: probabilities.data, distance: distance?.data[0] }; // only some models measure it
}

async function decode(file) {
  const asStored = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, asStored).catch(() => {
    throw new Error("This browser cannot read the file as an image. JPEG, PNG and WebP work everywhere.");
  });
  const { height, width } = bitmap;
  if (height * width > MAX_PIXELS) throw new Error(`${width} x ${height} pixels are too many.`);
  const rgb = new Uint8Array(height * width * 3);
  const canvas = new OffscreenCanvas(width, Math.min(height, ROWS));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // below transparent photos
  let next = 0;
  for (let top = 0; top < height; top += ROWS) {
    const rows = Math.min(ROWS, height - top);
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, -top);
    const rgba = context.getImageData(0, 0, width, rows).data;
    for (let index = 0; index < rgba.length; index += 4) {
      rgb[next++] = rgba[index];
      rgb[next++] = rgba[index + 1];
      rgb[next++] = rgba[index + 2];
    }
  }
  bitmap.close();
  return { rgb, height, width };
}
