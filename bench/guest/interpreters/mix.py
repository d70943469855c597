# What pyperformance's parts do, in small: nbody, fannkuch, richards-like objects,
# json, regular expressions, strings and dictionaries.
import json, re, sys


def nbody(steps):
    bodies = [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 39.47], [4.84, -1.16, -0.1, 0.6, 2.81, -0.02, 0.037],
              [8.34, 4.12, -0.4, -1.01, 1.82, 0.008, 0.011], [12.89, -15.11, -0.22, 1.08, 0.86, -0.01, 0.0017]]
    pairs = [(a, b) for i, a in enumerate(bodies) for b in bodies[i + 1:]]
    for _ in range(steps):
        for a, b in pairs:
            dx, dy, dz = a[0] - b[0], a[1] - b[1], a[2] - b[2]
            mag = 0.01 * (dx * dx + dy * dy + dz * dz) ** -1.5
            for k, d in ((3, dx), (4, dy), (5, dz)):
                a[k] -= d * b[6] * mag
                b[k] += d * a[6] * mag
        for body in bodies:
            for k in range(3):
                body[k] += 0.01 * body[k + 3]
    return round(bodies[0][0] * 1e6)


def fannkuch(n):
    count, most, checksum, r, perm1, sign = list(range(1, n + 1)), 0, 0, n, list(range(n)), 1
    while True:
        if perm1[0]:
            perm, flips = perm1[:], 0
            first = perm[0]
            while first:
                perm[:first + 1] = perm[first::-1]
                flips += 1
                first = perm[0]
            most = max(most, flips)
            checksum += sign * flips
        if sign == 1:
            perm1[0], perm1[1] = perm1[1], perm1[0]
            sign = -1
        else:
            perm1[1], perm1[2] = perm1[2], perm1[1]
            sign = 1
            for i in range(2, n):
                if count[i] != 1:
                    count[i] -= 1
                    break
                if i == n - 1:
                    return checksum * 100 + most
                count[i] = i + 1
                perm1.insert(i + 1, perm1.pop(0))


class Task:
    def __init__(self, name, next_task):
        self.name, self.next, self.work = name, next_task, 0

    def run(self, amount):
        self.work += amount & 7
        return self.next


def objects(rounds):
    task = None
    first = Task("last", None)
    task = first
    for i in range(20):
        task = Task(f"task {i}", task)
    first.next = task
    for i in range(rounds):
        task = task.run(i)
    return task.work


def text(rounds):
    total = 0
    for i in range(rounds):
        data = {"name": f"row {i}", "values": list(range(20)), "nested": {"a": 1.5, "b": [True, None, "x" * 10]}}
        back = json.loads(json.dumps(data))
        words = re.findall(r"[a-z]+|\d+", " ".join(sorted(back)) + back["name"])
        table = {}
        for word in words * 4:
            table[word] = table.get(word, 0) + len(word)
        total += sum(table.values())
    return total


scale = int(sys.argv[1]) if len(sys.argv) > 1 else 1
print(nbody(6000 * scale), fannkuch(7), objects(400000 * scale), text(3000 * scale))
