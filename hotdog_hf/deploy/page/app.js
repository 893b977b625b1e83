// The page: takes photos from files, the clipboard or the camera, and shows what the classifier says.

const MAX_BARS = 5;
// Below these probabilities the answer is "probably ..." and "not sure".
const SURE = 0.9, LIKELY = 0.6;
// The answer for a photo that may be none of the classes.
const UNKNOWN = "Unknown: unlike all training photos";

const find = (id) => document.getElementById(id);
const about = await (await fetch("model.json", { cache: "no-cache" })).json();
// A worker from a blob is bound by the page's content security policy; one from a file would not be.
const start = new Blob([`import "${new URL("classifier.js", location)}";`], { type: "text/javascript" });
const classifier = new Worker(URL.createObjectURL(start), { type: "module" });
const waiting = new Map(); // photos being classified: number -> their place in the list
let photos = 0, model = "loading";

document.title = titleOf(about.label_names);
document.querySelector("h1").textContent = document.title;

function titleOf(labels) {
  return labels.length > 3 ? "What is in this photo?" : `${capitalized(labels.join(" or "))}?`;
}

function capitalized(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function element(tag, className = "", text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

function showStatus() {
  const megabytes = (about.bytes / 1e6).toFixed(0);
  if (waiting.size) find("status").textContent = model === "ready" ? "Working …" : "Waiting for the model …";
  else if (model === "loading") find("status").textContent = `Loading the model, ${megabytes} MB …`;
}

// --- answers of the classifier -----------------------------------------------------------------

classifier.onmessage = ({ data: { number, probabilities, distance, problem } }) => {
  if (number === undefined) { // the model itself
    model = problem ? "broken" : "ready";
    find("status").textContent = problem ? `The model could not be loaded: ${problem}` : "Ready.";
    find("status").classList.toggle("problem", Boolean(problem));
    return showStatus();
  }
  const place = waiting.get(number);
  waiting.delete(number);
  const name = place.dataset.name;
  if (problem) place.lastChild.replaceChildren(element("p", "problem", problem), element("p", "name", name));
  else place.lastChild.replaceChildren(...answerOf(probabilities, distance), element("p", "name", name));
  place.dataset.state = problem ? "failed" : "done";
  find("status").textContent = `${name}: ${place.lastChild.firstChild.textContent}`; // read aloud
  showStatus();
};
classifier.onerror = () => {
  find("status").textContent = "This browser is too old for this page: it cannot run the model.";
};

function answerOf(probabilities, distance) {
  const ranked = about.label_names.map((label, index) => ({ label, probability: probabilities[index] }));
  ranked.sort((one, other) => other.probability - one.probability);
  const [{ label, probability }] = ranked;
  const caution = probability >= SURE ? "" : probability >= LIKELY ? "probably " : "not sure, perhaps ";
  const unknown = about.distance_limit !== null && distance > about.distance_limit;
  const answer = unknown ? UNKNOWN : capitalized(caution + label);
  const bars = element("ol", "bars");
  bars.setAttribute("aria-label", "Probabilities");
  for (const each of ranked.slice(0, MAX_BARS)) bars.append(barOf(each));
  const rest = ranked.length - MAX_BARS;
  const more = rest > 0 ? [element("p", "soft hint", `and ${rest} more ${rest > 1 ? "classes" : "class"}`)] : [];
  return [element("h2", "", answer), bars, ...more];
}

function barOf({ label, probability }) {
  const row = element("li"), track = element("div"), bar = element("i");
  row.dataset.probability = probability;
  bar.style.width = `${100 * probability}%`;
  track.append(bar);
  track.setAttribute("aria-hidden", "true");
  row.append(element("span", "", label), element("span", "", `${(100 * probability).toFixed(1)} %`), track);
  return row;
}

// --- photos --------------------------------------------------------------------------------------

function classify(files) {
  for (const file of files) {
    const number = photos++, place = element("li"), image = element("img");
    Object.assign(image, { src: URL.createObjectURL(file), alt: "" });
    image.onload = () => URL.revokeObjectURL(image.src);
    image.onerror = () => image.remove();
    Object.assign(place.dataset, { name: file.name || "photo", state: "waiting" });
    const words = element("div");
    words.append(element("p", "name", place.dataset.name));
    place.append(image, words);
    find("results").prepend(place);
    waiting.set(number, place);
    classifier.postMessage({ number, file });
  }
  showStatus();
}

for (const input of [find("files"), find("phone-camera")]) {
  input.onchange = () => {
    classify(input.files);
    input.value = ""; // so that the same photo can be chosen again
  };
}
document.addEventListener("paste", (event) => classify(event.clipboardData.files));
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") classify(event.dataTransfer.files);
  });
}

// --- camera --------------------------------------------------------------------------------------

find("open-camera").onclick = async () => {
  if (!navigator.mediaDevices) return find("phone-camera").click(); // browsers hide it from plain http
  try {
    find("video").srcObject = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", width: { ideal: 1920 } },
    });
  } catch (error) {
    find("status").textContent = `The camera cannot be used: ${error.message}. Choose a photo instead.`;
    return;
  }
  find("take-photo").disabled = true;
  showCamera(true);
  await find("video").play();
  find("take-photo").disabled = false;
  find("take-photo").focus();
};
find("take-photo").onclick = () => {
  const video = find("video"), canvas = element("canvas");
  Object.assign(canvas, { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => classify([new File([blob], "photo from the camera")]));
};
find("close-camera").onclick = () => {
  for (const track of find("video").srcObject.getTracks()) track.stop();
  showCamera(false);
  find("open-camera").focus();
};

function showCamera(open) {
  find("camera").hidden = !open;
  find("choose").hidden = open;
}

// --- offline -------------------------------------------------------------------------------------

find("status").classList.remove("late");
showStatus();
if (navigator.serviceWorker) {
  await navigator.serviceWorker.register(`sw.js?${about.version}`);
  await navigator.serviceWorker.ready;
  find("offline").hidden = false;
}
