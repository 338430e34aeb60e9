// llama.cpp through node-llama-cpp: greedy decoding of a .gguf file.
//
//   node peer_llama_cpp.mjs '{"model": "F.gguf", "prompt": [2, 5], ...}'
//
// node resolves node-llama-cpp from NODE_MODULES, the folder it is installed in.
import {createRequire} from 'node:module';
import {pathToFileURL} from 'node:url';

const require = createRequire(`${process.env.NODE_MODULES}/`);
const url = pathToFileURL(require.resolve('node-llama-cpp'));
const {getLlama} = await import(url);

const job = JSON.parse(process.argv[2]);
const llama = await getLlama({gpu: false, build: 'never', logLevel: 'error'});
const model = await llama.loadModel({modelPath: job.model});
const context = await model.createContext({
  contextSize: job.prompt.length + job.new_tokens + 8,
  threads: llama.cpuMathCores,
});
const sequence = context.getSequence();

async function generate(count) {
  await sequence.clearHistory();
  const tokens = [];
  let started;
  const made = sequence.evaluate(job.prompt, {temperature: 0});
  for await (const token of made) {
    started ??= performance.now(); // the prompt and its first token are there
    tokens.push(token);
    if (tokens.length > count) break;
  }
  return {tokens, seconds: (performance.now() - started) / 1000};
}

await generate(2);
const {tokens, seconds} = await generate(job.new_tokens);
console.log(JSON.stringify({
  tokens_per_second: job.new_tokens / seconds,
  tokens,
  peak_gib: process.resourceUsage().maxRSS / 2 ** 20,
}));
process.exit(0);
