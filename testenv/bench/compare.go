package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cilium/ebpf"

	"github.com/nftrace/nftrace/testenv/topo"
)

// bench measures in a topology that stands.
type bench struct {
	o      options
	log    io.Writer
	flow   *flow
	dir    string
	kernel string
}

// cleanup is how long the kernel has for what is left to do when a variant has ended.
const cleanup = time.Second

func newBench(ctx context.Context, o options, log io.Writer) (*bench, error) {
	b := &bench{o: o, log: log}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, err
	}
	counters := "inline"
	if cpus > 1 {
		counters = "per-CPU"
	}
	b.kernel = fmt.Sprintf("kernel %.*s, %d possible CPUs (%s counters)", len(release)-1, release, cpus, counters)
	if b.dir, err = os.MkdirTemp("", "bench"); err != nil {
		return nil, err
	}
	if _, err := topo.Up(ctx, "docker"); err != nil {
		return nil, err
	}
	// What the TRACE target needs to log packets of other namespaces than the first.
	if out, err := exec.CommandContext(ctx, "modprobe", "nf_log_syslog").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("modprobe nf_log_syslog: %w: %s", err, out)
	}
	if err := os.WriteFile("/proc/sys/net/netfilter/nf_log_all_netns", []byte("1"), 0); err != nil {
		return nil, err
	}
	if b.flow, err = newFlow(o.size); err != nil {
		return nil, err
	}
	// Fill the caches of routes and connections.
	return b, b.flow.send(101)
}

// variant is one way to look at packets.
type variant struct {
	name   string
	args   []string // of nftrace; nil: none runs
	trace  bool     // the TRACE target, instead
	traced bool     // every packet is to be printed
	budget float64  // instructions per packet more than the baseline; 0: none
}

func (b *bench) variants() []variant {
	return []variant{
		{name: "nftrace udp port 9", args: []string{"udp", "port", "9"}, budget: b.o.budgets.idle},
		{name: "nftrace --netns c1", args: []string{"--netns", "c1"}, budget: b.o.budgets.idle},
		{name: "nftrace --netns h -i vethc1", args: []string{"--netns", "h", "-i", "vethc1"}, budget: b.o.budgets.idle},
		{name: "nftrace, every packet", args: []string{}, traced: true, budget: b.o.budgets.traced},
		{name: "TRACE target, no syslogd", trace: true},
	}
}

// cost is what one packet costs in instructions.
type cost struct {
	all     float64
	process float64 // within nftrace's process, system calls included
}

// slope counts a few and many datagrams, and returns the cost of one.
// Many is how many; finish waits for what is left to do after the last one; pid is nftrace's, or 0.
func (b *bench) slope(many int, finish func() error, pid int) (c cost, sent int, err error) {
	count := func(n int) (all, process int64, err error) {
		var p0, p1 int64
		if pid != 0 {
			if p0, err = processTime(pid); err != nil {
				return 0, 0, err
			}
		}
		b0, err := busy()
		if err != nil {
			return 0, 0, err
		}
		if err := b.flow.send(n); err != nil {
			return 0, 0, err
		}
		if err := finish(); err != nil {
			return 0, 0, err
		}
		b1, err := busy()
		if err == nil && pid != 0 {
			p1, err = processTime(pid)
		}
		return b1 - b0, p1 - p0, err
	}
	few := b.o.few
	all1, proc1, err := count(few)
	if err != nil {
		return c, 0, err
	}
	all2, proc2, err := count(many)
	if err != nil {
		return c, 0, err
	}
	per := float64(many - few)
	return cost{all: float64(all2-all1) / per, process: float64(proc2-proc1) / per}, few + many, nil
}

func (b *bench) baseline() (float64, error) {
	// What an nftrace or the TRACE target left to be cleaned up is not a packet's cost.
	time.Sleep(cleanup)
	if err := b.flow.send(b.o.few); err != nil {
		return 0, err
	}
	c, _, err := b.slope(b.o.many, func() error { return nil }, 0)
	return c.all, err
}

// measure starts a variant, measures and stops it.
func (b *bench) measure(ctx context.Context, v variant) (c cost, err error) {
	if v.trace {
		if err := traceRules(ctx, "-I"); err != nil {
			return c, err
		}
		defer func() { err = errors.Join(err, traceRules(ctx, "-D")) }()
		c, _, err = b.slope(b.o.traced, func() error { return nil }, 0)
		return c, err
	}
	t, err := startTracer(ctx, b.o.nftrace, b.dir, v.args...)
	if err != nil {
		return c, err
	}
	// A first count fills nftrace's own caches, and gives it the memory that it keeps.
	many, finish := b.o.many, func() error { return nil }
	warm := b.o.few
	if v.traced {
		many, finish = b.o.traced, t.written
		warm = many
	}
	err = b.flow.send(warm)
	sent := 0
	if err == nil {
		err = t.written()
	}
	if err == nil {
		c, sent, err = b.slope(many, finish, t.cmd.Process.Pid)
	}
	s, serr := t.stop()
	if err = errors.Join(err, serr); err != nil {
		return c, err
	}
	want := 0
	if v.traced {
		want = warm + sent
	}
	if s.packets != want || s.lost != 0 || s.unresolved != 0 {
		return c, fmt.Errorf("%s: void: %d packets of %d were printed, %d lost, %d unresolved", v.name, s.packets, want, s.lost, s.unresolved)
	}
	return c, nil
}

func traceRules(ctx context.Context, command string) error {
	return topo.Shell(ctx, "h", "for c in PREROUTING OUTPUT; do iptables-legacy -w -t raw "+command+" $c -j TRACE; done\n")
}

// compare measures all variants and prints the table.
func (b *bench) compare(ctx context.Context, w io.Writer, only string) error {
	variants := selected(b.variants(), only)
	type series struct{ base, all, diff, process []float64 }
	got := make([]series, len(variants))
	var bases []float64
	for round := range b.o.rounds {
		before, err := b.baseline()
		if err != nil {
			return err
		}
		bases = append(bases, before)
		for i, v := range variants {
			c, err := b.measure(ctx, v)
			if err != nil {
				return err
			}
			after, err := b.baseline()
			if err != nil {
				return err
			}
			base := (before + after) / 2
			fmt.Fprintf(b.log, "round %d: %-28s %8.0f (baselines %.0f, %.0f)\n", round+1, v.name, c.all, before, after)
			s := &got[i]
			s.all = append(s.all, c.all)
			s.diff = append(s.diff, c.all-base)
			s.base = append(s.base, base)
			s.process = append(s.process, c.process)
			before = after
			bases = append(bases, after)
		}
	}
	fmt.Fprintf(w, "%s; %d rounds, medians; instructions per packet\n", b.kernel, b.o.rounds)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "variant\tper packet\tmore\tin its process\tratio\tbudget\t")
	fmt.Fprintf(tw, "no tracer\t%.0f\t\t\t1.00\t\t\n", median(bases))
	var over []error
	for i, v := range variants {
		s := got[i]
		diff, process, budget := median(s.diff), "", ""
		if v.args != nil {
			process = fmt.Sprintf("%.0f", median(s.process))
		}
		if v.budget > 0 {
			budget = fmt.Sprintf("%.0f ok", v.budget)
			if diff > v.budget {
				budget = fmt.Sprintf("%.0f EXCEEDED", v.budget)
				over = append(over, fmt.Errorf("%s: a packet costs %.0f instructions more, the budget is %.0f", v.name, diff, v.budget))
			}
		}
		fmt.Fprintf(tw, "%s\t%.0f\t%+.0f\t%s\t%.2f\t%s\t\n", v.name, median(s.all), diff, process, median(s.all)/median(s.base), budget)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	return errors.Join(over...)
}

func selected(all []variant, only string) []variant {
	return slices.DeleteFunc(all, func(v variant) bool { return !strings.Contains(v.name, only) })
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}
