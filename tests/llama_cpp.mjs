// node llama_cpp.mjs NODE_LLAMA_CPP_DIR MODEL.gguf PROMPTS.json NUM_TOKENS
// Prints, as JSON, the token ids of every prompt and of its greedy continuation in llama.cpp.
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [folder, modelPath, prompts, numTokens] = process.argv.slice(2);
const entry = createRequire(`${folder}/`).resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(entry));

const llama = await getLlama({build: "never", gpu: false, logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: model.trainContextSize,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();
const told = [];
for (const text of JSON.parse(readFileSync(prompts, "utf8"))) {
    await sequence.clearHistory();
    const prompt = model.tokenize(text);
    const ids = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        ids.push(token);
        if (ids.length == numTokens || token == model.tokens.eos)
            break;
    }
    told.push({prompt, ids});
}
console.log(JSON.stringify(told));
process.exit(0);
