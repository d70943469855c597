# OpenJDK: a program of many threads, compiled and run; HotSpot's compilers patch code that runs.
#
# packages: default-jdk-headless
# memory: 1G
# limit: 180
cd /tmp
cat >Main.java <<'JAVA'
import java.math.BigInteger;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;
import java.util.concurrent.locks.*;
import java.util.stream.*;

public class Main {
    interface Shape { double area(); }
    record Circle(double r) implements Shape { public double area() { return Math.PI * r * r; } }
    record Square(double a) implements Shape { public double area() { return a * a; } }
    record Slice(double r, double w) implements Shape { public double area() { return r * r * w / 2; } }

    static int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }

    static class Fork extends RecursiveTask<Long> {
        final int from, to;
        Fork(int from, int to) { this.from = from; this.to = to; }
        protected Long compute() {
            if (to - from < 1000) {
                long sum = 0;
                for (int i = from; i < to; i++) sum += (long) i * i % 7;
                return sum;
            }
            int middle = (from + to) >>> 1;
            Fork left = new Fork(from, middle);
            left.fork();
            return new Fork(middle, to).compute() + left.join();
        }
    }

    static synchronized void locked(long[] counter) { counter[0]++; }

    public static void main(String[] args) throws Exception {
        long begun = System.nanoTime();
        System.out.println("fib " + fib(32));

        // megamorphic after monomorphic: compiled code is thrown away
        double area = 0;
        for (int round = 0; round < 3; round++)
            for (int i = 0; i < 300000; i++) {
                Shape s = round == 0 || i % 3 == 0 ? new Circle(i) : i % 3 == 1 ? new Square(i) : new Slice(i, 0.5);
                area += s.area();
            }
        System.out.println("area " + area);

        long[] counter = new long[1];
        AtomicLong atomic = new AtomicLong();
        LongAdder adder = new LongAdder();
        ReentrantReadWriteLock lock = new ReentrantReadWriteLock();
        ConcurrentHashMap<Integer, Integer> map = new ConcurrentHashMap<>();
        int threads = 8;
        CountDownLatch done = new CountDownLatch(threads);
        for (int t = 0; t < threads; t++) {
            int seed = t;
            new Thread(() -> {
                for (int i = 0; i < 20000; i++) {
                    locked(counter);
                    atomic.incrementAndGet();
                    adder.add(seed);
                    map.merge((i * 31 + seed) % 1000, 1, Integer::sum);
                    lock.readLock().lock();
                    lock.readLock().unlock();
                }
                done.countDown();
            }).start();
        }
        done.await();
        System.out.println("threads " + counter[0] + " " + atomic + " " + adder + " " + map.size() + " "
            + map.values().stream().mapToInt(i -> i).sum());

        System.out.println("fork " + new ForkJoinPool(4).invoke(new Fork(0, 2000000)));
        System.out.println("stream " + IntStream.range(0, 300000).parallel().filter(i -> i % 3 == 0)
            .mapToObj(Integer::toString).collect(Collectors.summingInt(String::length)));

        ArrayBlockingQueue<Integer> queue = new ArrayBlockingQueue<>(16);
        Thread producer = new Thread(() -> {
            try { for (int i = 0; i < 20000; i++) queue.put(i); } catch (InterruptedException e) { }
        });
        producer.start();
        long taken = 0;
        for (int i = 0; i < 20000; i++) taken += queue.take();
        System.out.println("queue " + taken);

        int caught = 0;
        for (int i = 0; i < 20000; i++) {
            try {
                Object o = i % 2 == 0 ? null : "x";
                if (o.hashCode() == 120) caught += 2;
            } catch (NullPointerException e) { caught++; }
            try { caught += 10 / (i % 5); } catch (ArithmeticException e) { caught++; }
            try { caught += new int[3][i % 4].length; } catch (RuntimeException e) { caught++; }
        }
        System.out.println("caught " + caught);

        MessageDigest sha = MessageDigest.getInstance("SHA-256");
        for (int i = 0; i < 2000; i++) sha.update(("line " + i).getBytes(StandardCharsets.UTF_8));
        System.out.println("sha256 " + HexFormat.of().formatHex(sha.digest()));
        System.out.println("power " + BigInteger.valueOf(3).modPow(BigInteger.TWO.pow(600), BigInteger.TWO.pow(521).subtract(BigInteger.ONE)));

        List<byte[]> garbage = new ArrayList<>();
        for (int i = 0; i < 20000; i++) {
            garbage.add(new byte[8192]);
            if (garbage.size() > 100) garbage.clear();
        }
        System.gc();
        double trig = 0;
        for (int i = 0; i < 500000; i++) trig += Math.sin(i) * Math.sqrt(i) + Math.floorMod(i, 7);
        System.out.println("trig " + trig);
        System.err.println("main took " + (System.nanoTime() - begun) / 1000000 + " ms");
    }
}
JAVA
javac -d classes Main.java && java -Xmx256m -cp classes Main
java -Xmx256m -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -cp classes Main | sha256sum
java -Xmx256m -XX:-TieredCompilation -XX:+UseParallelGC -cp classes Main | sha256sum
