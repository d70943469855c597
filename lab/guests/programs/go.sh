# Go: go run, that is a compiler, an assembler and a linker, then a program of many goroutines.
#
# packages: golang-go
# memory: 1G
# limit: 180
mkdir -p /tmp/go
cd /tmp/go
export GO111MODULE=off GOCACHE=/tmp/go/cache GOPATH=/tmp/go/path GOFLAGS=-p=2
cat >main.go <<'GO'
package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"os"
	"runtime"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

func fib(n int) int {
	if n < 2 {
		return n
	}
	return fib(n-1) + fib(n-2)
}

func sieve(n int) int {
	ch := make(chan int)
	go func() {
		for i := 2; ; i++ {
			ch <- i
		}
	}()
	prime := 0
	for i := 0; i < n; i++ {
		prime = <-ch
		next := make(chan int)
		go func(in, out chan int, p int) {
			for {
				if i := <-in; i%p != 0 {
					out <- i
				}
			}
		}(ch, next, prime)
		ch = next
	}
	return prime
}

func main() {
	fmt.Println("fib", fib(32))
	fmt.Println("sieve", sieve(300))

	var count int64
	var group sync.WaitGroup
	var lock sync.Mutex
	seen := map[int]int{}
	for g := 0; g < 200; g++ {
		group.Add(1)
		go func(g int) {
			defer group.Done()
			for i := 0; i < 500; i++ {
				atomic.AddInt64(&count, int64(i))
				lock.Lock()
				seen[(g*31+i)%997]++
				lock.Unlock()
				if i%100 == 0 {
					runtime.Gosched()
				}
			}
		}(g)
	}
	group.Wait()
	total := 0
	for _, n := range seen {
		total += n
	}
	fmt.Println("goroutines", count, len(seen), total)

	// a loop without a call: preempted by signals
	stop := make(chan bool)
	go func() { time.Sleep(20 * time.Millisecond); close(stop) }()
	spins := 0
	go func() {
		for {
			spins++
		}
	}()
	<-stop
	fmt.Println("preempted")

	words := strings.Fields(strings.Repeat("a stitch in time saves nine ", 5000))
	sort.Strings(words)
	fmt.Printf("words %d %x\n", len(words), sha256.Sum256([]byte(strings.Join(words, ","))))
	f := new(big.Int).MulRange(1, 1000)
	fmt.Printf("factorial %x\n", sha256.Sum256(f.Bytes()))
	sum := 0.0
	for i := 1; i < 300000; i++ {
		sum += math.Sin(float64(i)) * math.Log(float64(i)) / math.Sqrt(float64(i))
	}
	fmt.Println("floats", sum)
	data, _ := json.Marshal(seen)
	fmt.Printf("json %x\n", sha256.Sum256(data))
	func() {
		defer func() { fmt.Println("recovered", recover()) }()
		var nothing *big.Int
		_ = nothing.Bits()[0]
	}()
	garbage := 0
	for i := 0; i < 200000; i++ {
		garbage += len(make([]byte, 512+i%512))
	}
	runtime.GC()
	fmt.Println("garbage", garbage)
	if len(os.Args) > 5 {
		fmt.Println(spins)
	}
}
GO
go run main.go
go vet main.go && echo vetted
go build -o program main.go && sha256sum program | cut -c1-16
