package main

import (
	"context"
	"fmt"
	"io"
	"time"
)

// attachTime tells how long nftrace needs from exec until it is attached. The VM
// must not count instructions: their count is no time.
func (b *bench) attachTime(ctx context.Context, w io.Writer) error {
	var times []float64
	for range 2*b.o.rounds + 1 {
		t, err := startTracer(ctx, b.o.nftrace, b.dir, "udp", "port", "9")
		if err != nil {
			return err
		}
		times = append(times, t.attach.Seconds())
		if _, err := t.stop(); err != nil {
			return err
		}
	}
	m := time.Duration(median(times) * float64(time.Second))
	fmt.Fprintf(w, "%s: attached after %.3f s (first %.3f s; median of %d; budget %v)\n",
		b.kernel, m.Seconds(), times[0], len(times), b.o.budgets.attach)
	if m > b.o.budgets.attach {
		return fmt.Errorf("nftrace is attached after %v, the budget is %v", m.Round(time.Millisecond), b.o.budgets.attach)
	}
	return nil
}
