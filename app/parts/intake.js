// Files on their way to the server: out of a drop, a file chooser or the clipboard, and up, with progress.
import { get, megabytes, Refused } from "/static/core.js";

const TAKEN = /\.(png|jpe?g|jfif|webp|bmp|avif|gif|tiff?|heic|heif|txt|caption|jsonl|csv|tsv|json|zip)$/i;
const HIDDEN = /(^|\/)(\.|__MACOSX\/|Thumbs\.db$|desktop\.ini$)/i;
const FILE_LIMIT = 64 * 1024 ** 2;

/** What was dropped, folders walked through: [[path, File]]. Call it at once: the list of a drop is empty after the event. */
export async function dropped(transfer) {
  const entries = [...transfer.items].filter((i) => i.kind === "file").map((i) => i.webkitGetAsEntry?.() ?? i.getAsFile()).filter(Boolean);
  const found = [];
  for (const entry of entries) await walk(entry, found);
  return found;
}
async function walk(entry, found) {
  if (entry instanceof File) return void found.push([entry.name, entry]);
  if (entry.isFile) {
    const file = await new Promise((done, failed) => entry.file(done, failed));
    return void found.push([entry.fullPath.replace(/^\//, ""), file]);
  }
  const reader = entry.createReader();
  for (;;) {  // a reader hands out at most 100 entries at a time
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) return;
    for (const one of some) await walk(one, found);
  }
}

/** Files of a chooser: [[path, File]]. */
export const chosen = (input) => [...input.files].map((file) => [file.webkitRelativePath || file.name, file]);

/** Call `tell({done, total})` about twice a second while the server looks at pictures. Returns what ends it. */
export function looking(tell) {
  let live = true;
  (async () => {
    while (live) {
      await new Promise((done) => setTimeout(done, 500));
      if (!live) return;
      try {
        const now = (await get("/images/looking")).looking;
        if (now && live) tell(now);
      } catch (error) { if (!(error instanceof Refused)) throw error; }
    }
  })();
  return () => { live = false; };
}

/** What is worth sending, and a sentence for each file that is not. System files of a folder are passed over in silence. */
export function sorted(files) {
  const take = [], problems = [];
  for (const [path, file] of files) {
    if (HIDDEN.test(path)) continue;
    if (!TAKEN.test(path) && !/(^|\/)crops\.json$/.test(path)) problems.push(`${path} is not an image, a caption (.txt) or a zip: left out.`);
    else if (file.size > FILE_LIMIT && !/\.zip$/i.test(path)) problems.push(`${path} has ${megabytes(file.size)}; a picture may have 67 MB at most.`);
    else take.push([path, file]);
  }
  return { take, problems };
}

/** Send files to POST /api/images. `progress(share)` from 0 to 1. Resolves to the answer; rejects with Refused. Returns {done, cancel}.
 *  `route`: another one that takes files. */
export function upload(files, progress, route = "/api/images") {
  const request = new XMLHttpRequest();
  const done = new Promise((resolve, reject) => {
    const form = new FormData();
    for (const [path, file] of files) form.append("files", file, path);
    request.open("POST", route);
    request.responseType = "json";
    request.upload.onprogress = (e) => e.lengthComputable && progress(e.loaded / e.total);
    request.onload = () => (request.status < 400 && request.response ? resolve(request.response)
      : reject(new Refused(request.response?.error || `The server answered with status ${request.status}.`, request.status, request.response?.errors)));
    request.onerror = () => reject(new Refused("The upload broke off: the server does not answer. Nothing was added; try again when it is back."));
    request.onabort = () => reject(new Refused("The upload was cancelled; nothing was added."));
    request.send(form);
  });
  return { done, cancel: () => request.abort() };
}
