// Run a model once in onnxruntime-node, on the CPU: node run_onnx.cjs REQUEST
//
// REQUEST is a JSON file: "model" (path), "threads", "feeds" and "outputs" (name -> {"type", "dims", "file"} and
// name -> file). Tensors are files of raw little-endian values. Prints a JSON object: the versions, the seconds that
// loading took, and type and dims of each output. onnxruntime-node is looked for where NODE_PATH says.

"use strict";

const fs = require("node:fs");
const ort = require("onnxruntime-node");

const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };

function read({ type, dims, file }) {
  const bytes = fs.readFileSync(file);
  const copy = new Uint8Array(bytes).buffer; // a file's buffer may start at an address that the array type refuses
  return new ort.Tensor(type, new ARRAYS[type](copy), dims);
}

async function main(path) {
  const request = JSON.parse(fs.readFileSync(path, "utf8"));
  const start = process.hrtime.bigint();
  const session = await ort.InferenceSession.create(request.model, {
    executionProviders: ["cpu"],
    intraOpNumThreads: request.threads,
    logSeverityLevel: 3,
  });
  const seconds = Number(process.hrtime.bigint() - start) / 1e9;
  const feeds = Object.fromEntries(Object.entries(request.feeds).map(([name, tensor]) => [name, read(tensor)]));
  const results = await session.run(feeds, Object.keys(request.outputs));
  const outputs = {};
  for (const [name, file] of Object.entries(request.outputs)) {
    const { type, dims, data } = results[name];
    fs.writeFileSync(file, Buffer.from(data.buffer, data.byteOffset, data.byteLength));
    outputs[name] = { type, dims };
  }
  console.log(JSON.stringify({ versions: ort.env.versions, load_seconds: seconds, outputs }));
}

main(process.argv[2]).catch((error) => {
  console.error(error);
  process.exit(1);
});
