package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// probe is what the kernel counts of one BPF program.
type probe struct {
	name string
	runs uint64
	time time.Duration
}

// probes returns the programs in the kernel, by ID.
func probes() (map[ebpf.ProgramID]probe, error) {
	all := map[ebpf.ProgramID]probe{}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, unix.ENOENT) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it went away
		}
		info, err := p.Info()
		if err == nil {
			var s *ebpf.ProgramStats
			if s, err = p.Stats(); err == nil {
				all[id] = probe{info.Name, s.RunCount, s.Runtime}
			}
		}
		p.Close()
		if err != nil {
			return nil, err
		}
	}
}

// profile prints what each probe costs a packet.
func (b *bench) profile(ctx context.Context, w io.Writer, only string) error {
	bias, err := b.noop(w)
	if err != nil {
		return err
	}
	for _, v := range selected(b.variants(), only) {
		if v.trace {
			continue
		}
		if err := b.profileVariant(ctx, w, v, bias); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) profileVariant(ctx context.Context, w io.Writer, v variant, bias float64) error {
	t, err := startTracer(ctx, b.o.nftrace, b.dir, v.args...)
	if err != nil {
		return err
	}
	defer t.stop()
	if err := b.flow.send(b.o.few); err != nil {
		return err
	}
	if err := t.written(); err != nil {
		return err
	}
	n := b.o.many
	if v.traced {
		n = b.o.traced
	}
	before, after, err := b.counted(n)
	if err != nil {
		return err
	}
	type row struct {
		name      string
		runs, all float64
	}
	var rows []row
	var runs, all float64
	for id, p := range after {
		r := row{p.name, float64(p.runs-before[id].runs) / float64(n), float64(p.time-before[id].time) / float64(n)}
		if r.runs == 0 {
			continue
		}
		r.all -= r.runs * bias
		runs, all = runs+r.runs, all+r.all
		rows = append(rows, r)
	}
	slices.SortFunc(rows, func(x, y row) int { return cmp.Compare(y.all, x.all) })
	fmt.Fprintf(w, "\n%s: probes, without their trampolines (%s)\n", v.name, b.kernel)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "probe\truns per packet\tinstructions per run\tper packet\t")
	for _, r := range rows {
		fmt.Fprintf(tw, "%s\t%.2f\t%.0f\t%.0f\t\n", r.name, r.runs, r.all/r.runs, r.all)
	}
	fmt.Fprintf(tw, "all\t%.2f\t\t%.0f\t\n", runs, all)
	return tw.Flush()
}

// counted sends n datagrams while the kernel counts.
func (b *bench) counted(n int) (before, after map[ebpf.ProgramID]probe, err error) {
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return nil, nil, fmt.Errorf("statistics of BPF programs: %w", err)
	}
	defer stats.Close()
	if before, err = probes(); err != nil {
		return nil, nil, err
	}
	if err := b.flow.send(n); err != nil {
		return nil, nil, err
	}
	after, err = probes()
	return before, after, err
}

// targets are functions and trace points with probes of nftrace's that the datagram meets.
var targets = []struct {
	name  string
	types []ebpf.AttachType
}{
	{"nf_hook_slow", []ebpf.AttachType{ebpf.AttachTraceFEntry}},
	{"nf_nat_manip_pkt", []ebpf.AttachType{ebpf.AttachTraceFEntry}},
	{"ip_local_deliver_finish", []ebpf.AttachType{ebpf.AttachTraceFEntry}},
	{"net_dev_queue", []ebpf.AttachType{ebpf.AttachTraceRawTp}},
	{"softirq_exit", []ebpf.AttachType{ebpf.AttachTraceRawTp}},
	// What it would cost to see a hook's end, too.
	{"nf_hook_slow", []ebpf.AttachType{ebpf.AttachTraceFEntry, ebpf.AttachTraceFExit}},
}

// noop attaches probes that do nothing, tells what they cost, and returns how much
// the kernel's statistics add to the time of each run.
func (b *bench) noop(w io.Writer) (bias float64, err error) {
	fmt.Fprintf(w, "probes that do nothing (%s)\n", b.kernel)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "at\tprobes\truns per packet\tinstructions per run\tper packet\tsaid by statistics\t")
	for i, target := range targets {
		runs, all, said, err := b.noopAt(target.name, target.types)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", target.name, err)
		}
		if runs == 0 {
			continue
		}
		if i == 0 {
			bias = said
		}
		fmt.Fprintf(tw, "%s\t%d\t%.2f\t%.0f\t%.0f\t%.0f\t\n", target.name, len(target.types), runs, all/runs, all, said)
	}
	return bias, tw.Flush()
}

func (b *bench) noopAt(target string, types []ebpf.AttachType) (runs, all, said float64, err error) {
	var diffs []float64
	for range b.o.rounds {
		before, err := b.baseline()
		if err != nil {
			return 0, 0, 0, err
		}
		var close []io.Closer
		for _, t := range types {
			p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
				Name: "noop", Type: ebpf.Tracing, AttachType: t, AttachTo: target, License: "GPL",
				Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
			})
			if err != nil {
				return 0, 0, 0, err
			}
			l, err := link.AttachTracing(link.TracingOptions{Program: p})
			if err != nil {
				return 0, 0, 0, err
			}
			close = append(close, l, p)
		}
		c, _, err := b.slope(b.o.many, func() error { return nil }, 0)
		if err != nil {
			return 0, 0, 0, err
		}
		p0, p1, err := b.counted(b.o.few)
		if err != nil {
			return 0, 0, 0, err
		}
		for _, c := range close {
			c.Close()
		}
		after, err := b.baseline()
		if err != nil {
			return 0, 0, 0, err
		}
		diffs = append(diffs, c.all-(before+after)/2)
		for id, p := range p1 {
			if n := p.runs - p0[id].runs; n > 0 {
				runs = float64(n) / float64(b.o.few)
				said = float64(p.time-p0[id].time) / float64(n)
			}
		}
	}
	return runs, median(diffs), said, nil
}
