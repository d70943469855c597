// A hot loop that V8 compiles: typed arrays, objects, closures, strings.
const scale = Number(process.argv[2] || 1);
let sum = 0;
const table = new Float64Array(1 << 12);
for (let i = 0; i < 1.5e7 * scale; i++) {
  table[i & 4095] += i * 0.5;
  sum = (sum + (i ^ (i >> 3))) | 0;
}
const points = [];
for (let i = 0; i < 300000 * scale; i++) points.push({ x: i % 101, y: (i * 7) % 103, name: 'p' + (i % 50) });
const groups = new Map();
for (const p of points) groups.set(p.name, (groups.get(p.name) || 0) + p.x * p.y);
points.sort((a, b) => a.x - b.x || a.y - b.y);
console.log(sum, table[77], groups.size, points[1000].y);
