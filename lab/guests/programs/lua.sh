# Lua's interpreter and LuaJIT's traces: the same program, interpreted, compiled, and by the PUC interpreter.
#
# packages: lua5.4 luajit
# memory: 256M
# limit: 60
cd /tmp
cat >program.lua <<'LUA'
local floor, format = math.floor, string.format
local function fib(n) if n < 2 then return n end return fib(n - 1) + fib(n - 2) end
print('fib', fib(27))

local function sieve(n)
  local flags, count = {}, 0
  for i = 2, n do flags[i] = true end
  for i = 2, n do
    if flags[i] then
      count = count + 1
      for k = i + i, n, i do flags[k] = false end
    end
  end
  return count
end
print('sieve', sieve(500000))

local bodies = {}
for i = 1, 5 do bodies[i] = { x = i, y = i * i / 3, z = -i, vx = 0, vy = 0.01 * i, vz = 0, m = 1 / i } end
for _ = 1, 20000 do
  for i = 1, 5 do
    local a = bodies[i]
    for k = i + 1, 5 do
      local b = bodies[k]
      local dx, dy, dz = a.x - b.x, a.y - b.y, a.z - b.z
      local d = dx * dx + dy * dy + dz * dz
      local mag = 0.001 / (d * d ^ 0.5)
      a.vx, a.vy, a.vz = a.vx - dx * b.m * mag, a.vy - dy * b.m * mag, a.vz - dz * b.m * mag
      b.vx, b.vy, b.vz = b.vx + dx * a.m * mag, b.vy + dy * a.m * mag, b.vz + dz * a.m * mag
    end
  end
  for i = 1, 5 do
    local a = bodies[i]
    a.x, a.y, a.z = a.x + 0.001 * a.vx, a.y + 0.001 * a.vy, a.z + 0.001 * a.vz
  end
end
print('bodies', format('%.12f %.12f', bodies[1].x, bodies[5].y))

local seed, numbers = 42, {}
for i = 1, 50000 do seed = (seed * 16807) % 2147483647; numbers[i] = seed end
table.sort(numbers)
print('sorted', format('%d %d', numbers[1], numbers[25000]))

local parts = {}
for i = 1, 50000 do parts[#parts + 1] = format('%d:%x', i, i * 7) end
local text, hash = table.concat(parts, ','), 0
for c in text:gmatch('[%da-f]+') do hash = (hash * 31 + #c) % 1000003 end
print('text', #text, hash, (text:gsub('1%d*:', '')):len())

local sum = 0
local walker = coroutine.wrap(function() for i = 1, 200000 do coroutine.yield(i) end end)
for _ = 1, 200000 do sum = (sum + walker()) % 1000003 end
print('coroutine', sum)

local ok, failed = 0, 0
for i = 1, 100000 do
  local good = pcall(function() if i % 3 == 0 then error('x') end end)
  if good then ok = ok + 1 else failed = failed + 1 end
end
print('pcall', ok, failed)
local s = 0
for i = 1, 3000000 do s = s + floor(i / 3) % 7 end
print('loop', format('%d', s))
LUA
lua5.4 program.lua
luajit program.lua
luajit -joff program.lua
luajit -Ohotloop=2 -Omaxtrace=20000 -Omaxmcode=4096 program.lua
