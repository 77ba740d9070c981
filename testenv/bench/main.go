package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
		os.Exit(1)
	}
}

type options struct {
	nftrace   string
	rounds    int
	few, many int // datagrams of the two counts
	traced    int // the same as many, where each datagram costs much
	size      int // of a datagram's payload
	budgets   budgets
}

// budgets are upper bounds of what nftrace may cost.
type budgets struct {
	idle, traced float64 // instructions per packet
	attach       time.Duration
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o := options{}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.nftrace, "nftrace", "/usr/local/bin/nftrace", "the program to measure")
	fs.IntVar(&o.rounds, "rounds", 3, "number of rounds; medians are reported")
	fs.IntVar(&o.few, "few", 211, "datagrams of the short count")
	fs.IntVar(&o.many, "many", 10007, "datagrams of the long count")
	fs.IntVar(&o.traced, "traced", 1009, "datagrams of the long count where each is traced")
	fs.IntVar(&o.size, "size", 64, "bytes of payload")
	fs.Float64Var(&o.budgets.idle, "budget-idle", 2000, "instructions that a packet may cost more that no filter matches")
	fs.Float64Var(&o.budgets.traced, "budget-traced", 40000, "instructions that a traced packet may cost more")
	fs.DurationVar(&o.budgets.attach, "budget-attach", time.Second, "time until nftrace is attached")
	attach := fs.Bool("attach", false, "measure the time until nftrace is attached, and nothing else")
	prof := fs.Bool("profile", false, "tell what each probe costs, and nothing else")
	only := fs.String("only", "", "measure the variants whose names contain this")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("what is %q?", fs.Arg(0))
	}
	if os.Getenv("NFTRACE_IN_VM") != "1" {
		return errors.New("not on this machine: run it in a VM (make bench)")
	}
	b, err := newBench(ctx, o, stderr)
	if err != nil {
		return err
	}
	switch {
	case *attach:
		return b.attachTime(ctx, stdout)
	case *prof:
		return b.profile(ctx, stdout, *only)
	default:
		return b.compare(ctx, stdout, *only)
	}
}
