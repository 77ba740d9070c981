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

// again is how long after a first signal another one is taken to be the same.
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
	ctx, stop := signal.NotifyContext(context.Background(), endingSignals()...)
	// Who asks again, for it does not end, is obeyed at once. Some ask twice (timeout).
	context.AfterFunc(ctx, func() { time.AfterFunc(again, stop) })
	status := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// endingSignals are those that end nftrace. Under nohup SIGHUP is ignored: it stays so, for nftrace and
// for the command behind --.
func endingSignals() []os.Signal {
	all := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		all = append(all, syscall.SIGHUP)
	}
	return all
}
