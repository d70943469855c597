# Node: V8 compiles, throws away and compiles again; regular expressions, WebAssembly, workers.
#
# packages: nodejs
# memory: 1G
# limit: 120
cd /tmp
cat >program.js <<'JS'
const crypto = require('crypto');
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const show = (name, value) => console.log(name, value);
const timed = (name, work) => {
  const begun = process.hrtime.bigint();
  show(name, work());
  console.error(name, Number((process.hrtime.bigint() - begun) / 1000000n), 'ms');
};

function mandelbrot(size) {
  let inside = 0;
  for (let y = 0; y < size; y++)
    for (let x = 0; x < size; x++) {
      let a = 0, b = 0, i = 0;
      const cx = 2.5 * x / size - 1.8, cy = 2 * y / size - 1;
      while (i < 100 && a * a + b * b < 4) [a, b, i] = [a * a - b * b + cx, 2 * a * b + cy, i + 1];
      if (i === 100) inside++;
    }
  return inside;
}
const fib = n => n < 2 ? n : fib(n - 1) + fib(n - 2);
function polymorphic() {
  // integers, then doubles, strings and objects through one function: deoptimisations
  const add = (a, b) => a + b;
  let hash = 0;
  for (const make of [i => i, i => i / 3, i => String(i), i => ({ valueOf: () => i })])
    for (let i = 0; i < 50000; i++) hash = (hash * 31 + String(add(make(i), make(i + 1))).length) | 0;
  return hash;
}
function generated() {
  let sum = 0;
  for (let i = 0; i < 2000; i++) sum += new Function('a', `let s = ${i}; for (let k = 0; k < 20; k++) s += a * k; return s;`)(i % 10);
  return sum;
}
function wasm() {
  // (func (export "sum") (param i32) (result i32)): the sum of the squares below its argument
  const bytes = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127, 3, 2, 1, 0, 7, 7, 1, 3, 115, 117, 109, 0, 0,
    10, 33, 1, 31, 1, 2, 127, 3, 64, 32, 1, 32, 1, 108, 32, 2, 106, 33, 2, 32, 1, 65, 1, 106, 34, 1, 32, 0, 72, 13, 0, 11, 32, 2, 11]);
  const { sum } = new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports;
  return sum(5000000);
}
if (!isMainThread) {
  parentPort.postMessage(fib(24) + workerData);
} else {
  timed('mandelbrot', () => mandelbrot(250));
  timed('fib', () => fib(30));
  timed('polymorphic', polymorphic);
  timed('generated', generated);
  timed('regexp', () => {
    const text = 'the quick brown fox jumps over the lazy dog 1234 times; '.repeat(3000);
    return [/(\w+) (fox|dog) (\w+)/g, /\d{2,}/g, /[aeiou]{2}/g, /(?<=o)w/g].map(r => [...text.matchAll(r)].length).join();
  });
  timed('json', () => {
    const rows = Array.from({ length: 20000 }, (_, i) => ({ id: i, name: `n${i}`, list: [i, i / 7, null, i % 2 === 0] }));
    return crypto.createHash('sha256').update(JSON.stringify(JSON.parse(JSON.stringify(rows)))).digest('hex');
  });
  timed('sort', () => {
    let seed = 1;
    const numbers = Float64Array.from({ length: 200000 }, () => (seed = seed * 48271 % 2147483647));
    return [...numbers].sort((a, b) => a - b).slice(1000, 1003).join() + numbers.sort()[5000];
  });
  timed('map', () => {
    const map = new Map();
    for (let i = 0; i < 300000; i++) map.set('k' + i % 5000, (map.get('k' + i % 5000) || 0) + i);
    return [...map.values()].reduce((a, b) => a + b, 0);
  });
  timed('bigint', () => ((3n ** 5000n) % (2n ** 521n - 1n)).toString(16));
  timed('floats', () => {
    let s = 0;
    for (let i = 1; i < 300000; i++) s += Math.sin(i) * Math.log(i) / Math.hypot(i, 2) + (i % 1.5);
    return s;
  });
  timed('wasm', wasm);
  timed('garbage', () => {
    let kept = [];
    for (let i = 0; i < 300000; i++) { kept.push({ i, next: kept[i & 7] }); if (kept.length > 2000) kept = kept.slice(1500); }
    return kept.length;
  });
  Promise.all([1, 2, 3].map(n => new Promise((resolve, reject) => {
    const worker = new Worker(__filename, { workerData: n });
    worker.on('message', resolve).on('error', reject);
  }))).then(answers => show('workers', answers.join()));
}
JS
node program.js
node --jitless -e 'let s = 0; for (let i = 0; i < 1e6; i++) s += i % 7; console.log("jitless", s)'
for flags in --always-sparkplug --no-opt "--stress-compaction --max-lazy"; do
    echo "cold$(echo " $flags" | tr -d '"'): $(node $flags -e 'console.log([..."kombi"].map(c => c.charCodeAt()).join("-"))')"
done
