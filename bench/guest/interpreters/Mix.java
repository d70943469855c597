import java.util.ArrayList;
import java.util.HashMap;

/** A hot loop that HotSpot compiles: arrays, objects, strings and maps. */
public final class Mix {
    record Point(int x, int y) {}

    public static void main(String[] arguments) {
        int scale = arguments.length > 0 ? Integer.parseInt(arguments[0]) : 1;
        if (scale == 0) {
            System.out.println("started");
            return;
        }
        double[] table = new double[4096];
        int sum = 0;
        for (int i = 0; i < 40_000_000 * scale; i++) {
            table[i & 4095] += i * 0.5;
            sum += i ^ i >> 3;
        }
        var points = new ArrayList<Point>();
        var counts = new HashMap<String, Integer>();
        for (int i = 0; i < 300_000 * scale; i++) {
            points.add(new Point(i % 101, i * 7 % 103));
            counts.merge("p" + i % 50, i % 13, Integer::sum);
        }
        points.sort((a, b) -> a.x() != b.x() ? Integer.compare(a.x(), b.x()) : Integer.compare(a.y(), b.y()));
        System.out.println(sum + " " + table[77] + " " + counts.get("p7") + " " + points.get(1000).y());
    }
}
