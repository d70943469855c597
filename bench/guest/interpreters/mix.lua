-- Tables, closures, strings and numbers.
local scale = tonumber(arg[1]) or 1
local function queens(n)
  local count, cols, d1, d2 = 0, {}, {}, {}
  local function place(row)
    if row > n then count = count + 1 return end
    for c = 1, n do
      if not cols[c] and not d1[row + c] and not d2[row - c + n] then
        cols[c], d1[row + c], d2[row - c + n] = true, true, true
        place(row + 1)
        cols[c], d1[row + c], d2[row - c + n] = nil, nil, nil
      end
    end
  end
  place(1)
  return count
end
local sum = 0.0
for i = 1, 2000000 * scale do sum = sum + (i % 7) * 0.5 end
local parts = {}
for i = 1, 100000 * scale do parts[#parts + 1] = string.format("%d:%x", i, i * 7) end
local text, found = table.concat(parts, " "), 0
for _ in text:gmatch("%x+:%x*f") do found = found + 1 end
print(queens(8), sum, #text, found)
