// Nftrace tells what happened to a packet: which hook, table, chain and rule it met
// on its way through netfilter, and what became of it. It inserts no rule and writes no
// log line.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"
)

// again is how long after a first signal another one is taken to be the same, and how long nftrace may take
// to end at once.
const again = time.Second

// What is alive is little, what passes through is much: garbage is collected less often than by
// default (debug.SetGCPercent), and hardly ever before packets can be seen.
const (
	gcStarting = 1600
	gcTracing  = 400
)

func main() {
	debug.SetGCPercent(gcStarting)
	// A reader that goes away is an error of the write, not a death. What is ignored would be by the
	// command behind --, too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, endingSignals()...)
	ctx, end := context.WithCancel(context.Background())
	now, endNow := context.WithCancel(context.Background())
	over := make(chan struct{})
	go obey(signals, end, endNow, over)
	status := run(ctx, now, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	close(over)
	if now.Err() != nil {
		select {} // obey lets it die
	}
	os.Exit(status)
}

// obey ends nftrace by the first signal. Who asks again, for it does not end, is obeyed at once: once over is
// closed, or that takes too long, it dies. Some ask twice (timeout).
func obey(signals <-chan os.Signal, end, endNow context.CancelFunc, over <-chan struct{}) {
	<-signals
	end()
	first := time.Now()
	by := <-signals
	for time.Since(first) < again {
		by = <-signals
	}
	endNow()
	select {
	case <-over:
	case <-time.After(again):
	}
	die(by.(syscall.Signal))
}

// die ends nftrace as the signal would have, had nobody waited for it.
func die(by syscall.Signal) {
	signal.Reset(by)
	if by != syscall.SIGQUIT {
		syscall.Kill(pid(), by)
		time.Sleep(again)
	}
	os.Exit(128 + int(by))
}

// endingSignals are those that end nftrace; to SIGQUIT (Ctrl-\), Go would print its goroutines. What is ignored
// (SIGHUP under nohup) stays so, for nftrace and for the command behind --.
func endingSignals() []os.Signal {
	all := []os.Signal{os.Interrupt, syscall.SIGTERM}
	for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGQUIT} {
		if !signal.Ignored(s) {
			all = append(all, s)
		}
	}
	return all
}
