// Nftrace tells what happened to a packet: which hook, table, chain and rule it met
// on its way through netfilter, and what became of it. It inserts no rule and writes no
// log line.
package main

import (
	"context"
	"errors"
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
	now, endNow := context.WithCancelCause(context.Background())
	go obey(signals, end, endNow)
	status := run(ctx, now, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	var by signalled
	if errors.As(context.Cause(now), &by) {
		die(by.Signal)
	}
	os.Exit(status)
}

// signalled is the cause of a context that a signal ended.
type signalled struct{ syscall.Signal }

func (s signalled) Error() string { return s.Signal.String() }

// obey ends nftrace by the first signal. Who asks again, for it does not end, is obeyed at once, and where
// that takes too long, it dies. Some ask twice (timeout).
func obey(signals <-chan os.Signal, end context.CancelFunc, endNow context.CancelCauseFunc) {
	<-signals
	end()
	first := time.Now()
	sig := <-signals
	for time.Since(first) < again {
		sig = <-signals
	}
	by := sig.(syscall.Signal)
	endNow(signalled{by})
	time.Sleep(again)
	die(by)
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
