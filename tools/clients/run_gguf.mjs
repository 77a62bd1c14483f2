// Generate greedily in node-llama-cpp, on the CPU: node run_gguf.mjs MODEL.gguf PROMPT COUNT THREADS
//
// PROMPT is a JSON list of token ids, taken as it is: nothing is put before it. COUNT tokens follow, through any end
// of text. Prints a JSON object: "tokens", and in "top" for each of them the TOP most likely tokens at that place, as
// [id, natural logarithm of the probability], the likeliest first. node-llama-cpp is looked for where NODE_PATH says;
// GGML_BACKEND_PATH names a plug-in of llama.cpp to load.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const TOP = 32;

function positive(text, name) {
  const number = Number(text);
  if (!Number.isInteger(number) || number < 1) throw new Error(`${name} has to be a whole number from 1, not ${text}`);
  return number;
}

function listOfIds(text) {
  const ids = JSON.parse(text);
  const right = Array.isArray(ids) && ids.length > 0 && ids.every((id) => Number.isInteger(id) && id >= 0);
  if (!right) throw new Error(`PROMPT has to be a list of token ids, not ${text}`);
  return ids;
}

function likeliest(logits) {
  const sorted = [...logits].sort(([a, x], [b, y]) => y - x || a - b);
  const highest = sorted[0][1];
  // In FP64: llama.cpp's own probabilities are FP32, and their sum is rounded at each of all the tokens there are.
  const total = highest + Math.log(sorted.reduce((sum, [, logit]) => sum + Math.exp(logit - highest), 0));
  return sorted.slice(0, TOP).map(([id, logit]) => [id, logit - total]);
}

async function main(args) {
  if (args.length !== 4) throw new Error("usage: node run_gguf.mjs MODEL.gguf PROMPT COUNT THREADS");
  const [path, prompt, count, threads] = [
    args[0],
    listOfIds(args[1]),
    positive(args[2], "COUNT"),
    positive(args[3], "THREADS"),
  ];
  // `import` does not look where NODE_PATH says, `require` does.
  const { getLlama } = await import(pathToFileURL(createRequire(import.meta.url).resolve("node-llama-cpp")));
  const llama = await getLlama({
    gpu: false,
    build: "never",
    maxThreads: threads,
    logger: (_, message) => process.stderr.write(`${message.trimEnd()}\n`), // its own may write to stdout
  });
  const model = await llama.loadModel({ modelPath: path });
  const context = await model.createContext({
    contextSize: prompt.length + count,
    threads: { ideal: threads, min: threads },
    flashAttention: false,
    // As in PyTorch. Under any other name these are ignored, and what is kept is rounded to 16 bits.
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
  });
  const sequence = context.getSequence();
  const answer = { tokens: [], top: [] };
  let fed = prompt;
  while (answer.tokens.length < count) {
    const last = [fed.at(-1), { generateNext: { token: true, logits: true, options: { temperature: 0 } } }];
    const { next } = (await sequence.controlledEvaluate([...fed.slice(0, -1), last])).at(-1);
    if (next.token == null) throw new Error("no token was generated");
    answer.tokens.push(next.token);
    answer.top.push(likeliest(next.logits));
    fed = [next.token];
  }
  await llama.dispose();
  console.log(JSON.stringify(answer));
}

// Not process.exit: it may cut off what is still to be written.
main(process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
