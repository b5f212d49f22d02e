// Runs the generator beside the page, which stays usable meanwhile. Messages: {load: address of the model} once, then
// {id, inputs: {name: {data, dims}}}; answers: {loaded}, {id, images, dims, milliseconds} or {id, error}.

import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that plain file servers do not send
ort.env.logLevel = "error";
let session;

self.onmessage = async ({ data }) => {
  try {
    if (data.load) {
      session = await ort.InferenceSession.create(data.load, { executionProviders: ["wasm"] });
      self.postMessage({ loaded: true });
      return;
    }
    const feeds = {};
    for (const [name, { data: values, dims }] of Object.entries(data.inputs)) {
      feeds[name] = new ort.Tensor("float32", values, dims);
    }
    const begin = performance.now();
    const { images } = await session.run(feeds);
    const values = images.data;
    self.postMessage({ id: data.id, images: values, dims: images.dims, milliseconds: performance.now() - begin });
  } catch (error) {
    self.postMessage({ id: data.id, error: String(error?.message ?? error) });
  }
};
