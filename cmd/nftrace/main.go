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
)

func main() {
	// What is alive is little, what passes through is much: collect it less often.
	debug.SetGCPercent(400)
	// A reader that goes away is an error of the write, not a death.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}
