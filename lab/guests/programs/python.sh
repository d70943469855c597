# CPython's own tests of arithmetic, floating point, hashing, threads, processes, mapped memory and signals.
#
# packages: python3 libpython3.11-testsuite
# memory: 1G
# limit: 900
cat >/tmp/own_tests.py <<'PYTHON'
"""Runs test modules and prints what does not depend on time or place."""
import importlib, io, os, sys, unittest

# What tests print, as they like, to what the processes that they start inherit as well, is noise.
report = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
load = unittest.defaultTestLoader

def run(name, suite):
    noise = io.StringIO()
    result = unittest.TextTestRunner(stream=noise, verbosity=0).run(suite)
    print(f"{name}: {result.testsRun} run, {len(result.failures)} failed, {len(result.errors)} in error", file=report)
    for test, text in result.failures + result.errors:
        print("  not passed:", test.id(), file=report)
        print(text, file=sys.stderr, flush=True)

for name in sys.argv[1:]:
    print(name, "starts", file=sys.stderr, flush=True)
    module = importlib.import_module("test." + name)
    if hasattr(module, "test_main"):
        # test_decimal makes its classes ready there.
        module.run_unittest = lambda *classes: run(name, unittest.TestSuite(map(load.loadTestsFromTestCase, classes)))
        module.test_main(arith=False)
    else:
        run(name, load.loadTestsFromModule(module))
PYTHON
cd /tmp
modules='test_math test_cmath test_struct test_float test_hash'
[ "$1" = quick ] || modules="$modules test_long test_array test_hmac test_int test_complex test_decimal test_fractions test_random test_hashlib test_zlib test_bz2
    test_dict test_set test_sort test_re test_json test_thread test_threading test_queue test_subprocess test_mmap test_signal"
# shellcheck disable=SC2086 # a list
python3 own_tests.py $modules
