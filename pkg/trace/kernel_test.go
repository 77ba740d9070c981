package trace

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"github.com/nftrace/nftrace/bpf"
	"github.com/nftrace/nftrace/pkg/filter"
)

func TestLockdownMode(t *testing.T) {
	for content, want := range map[string]string{
		"[none] integrity confidentiality\n": "none",
		"none integrity [confidentiality]\n": "confidentiality",
		"":                                   "",
		"none [integr":                       "integr",
	} {
		path := filepath.Join(t.TempDir(), "lockdown")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := lockdownMode(path); got != want {
			t.Errorf("%q: mode %q, want %q", content, got, want)
		}
	}
	if got := lockdownMode(filepath.Join(t.TempDir(), "missing")); got != "" {
		t.Errorf("no file: mode %q", got)
	}
}

func TestErrHidden(t *testing.T) {
	const sysctl, capability = "sysctl kernel.kptr_restrict=1", "CAP_SYSLOG"
	path := filepath.Join(t.TempDir(), "kptr_restrict")
	if got := errHidden(path).Error(); !strings.Contains(got, sysctl) {
		t.Errorf("no file: %s", got)
	}
	for content, want := range map[string]string{"0\n": capability, "1\n": capability, "2\n": sysctl} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := errHidden(path).Error(); !strings.Contains(got, want) {
			t.Errorf("%q: %s", content, got)
		}
	}
}

func TestPreemptible(t *testing.T) {
	for content, want := range map[string]bool{
		"none (voluntary) full \n":      false,
		"(none) voluntary full \n":      false,
		"none voluntary (full) \n":      true,
		"none voluntary full (lazy) \n": true,
	} {
		path := filepath.Join(t.TempDir(), "preempt")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := preemptible(path, "missing"); got != want {
			t.Errorf("%q: %v, want %v", content, got, want)
		}
	}
	if !preemptible("missing", "missing") {
		t.Error("unknown preemption must be taken for full")
	}
	for content, want := range map[string]bool{
		"ffffa0024c9bf000 T schedule\nffffa0024c9c0890 T preempt_schedule_irq\n": false,
		"0000000000000000 T schedule\n0000000000000000 T preempt_schedule\n":     true,
		"0000000000000000 T something\n":                                         true,
		"":                                                                       true,
	} {
		path := filepath.Join(t.TempDir(), "kallsyms")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := preemptible("missing", path); got != want {
			t.Errorf("%q: %v, want %v", content, got, want)
		}
	}
}

func TestParseKallsyms(t *testing.T) {
	const file = `0000000000000000 A fixed_percpu_data
000000000002d000 A pcpu_hot
ffffffff82e1c1c0 R __per_cpu_offset
ffffffff81234560 t pcpu_hot
000000000003e0c8 d xt_recseq	[x_tables]
short
`
	got, err := parseKallsyms(strings.NewReader(file), "pcpu_hot", "__per_cpu_offset", "xt_recseq", "absent")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]uint64{"pcpu_hot": 0x2d000, "__per_cpu_offset": 0xffffffff82e1c1c0, "xt_recseq": 0x3e0c8}
	for name, addr := range want {
		if got[name].addr != addr {
			t.Errorf("%s at %#x, want %#x", name, got[name].addr, addr)
		}
	}
	if len(got) != len(want) {
		t.Errorf("got %v", got)
	}
	const functions = "ffffffff81000000 T before\nffffffff81000010 T nf_hook_slow\nffffffff81000010 t alias\nffffffff810000f0 T behind\n"
	if got, err := parseKallsyms(strings.NewReader(functions), "nf_hook_slow"); err != nil || got["nf_hook_slow"] != (symbol{0xffffffff81000010, 0xe0}) {
		t.Errorf("nf_hook_slow: %x, %v", got["nf_hook_slow"], err)
	}
	if _, err := parseKallsyms(strings.NewReader("zzzzffff82e1c1c0 R __per_cpu_offset\n"), "__per_cpu_offset"); err == nil {
		t.Error("an address that is none was accepted")
	}
}

// A filter that looks at what changes on a packet's way may match later.
func TestMayMatchLater(t *testing.T) {
	for expr, want := range map[string]bool{
		"icmp":                         false,
		"tcp[tcpflags] & tcp-syn != 0": false,
		"greater 100":                  true,
		"ether host 02:00:00:00:00:01": true,
		"vlan 5":                       true,
		"ip6 and icmp6":                false,
		"port 80":                      true,
		"udp and src host 192.0.2.1":   true,
		"net 2001:db8::/32":            true,
	} {
		e, err := filter.Parse(expr)
		if err != nil {
			t.Fatal(err)
		}
		if got := mayMatchLater(e.Instructions()); got != want {
			t.Errorf("%q: %v, want %v", expr, got, want)
		}
	}
}

func TestLooksAtDetail(t *testing.T) {
	for expr, want := range map[string]bool{
		"tcp[tcpflags] & tcp-syn != 0": true,
		"icmp[icmptype] = icmp-echo":   true,
		"greater 100":                  true,
		"ether host 02:00:00:00:00:01": true,
		"udp port 80":                  false,
		"icmp":                         false,
		"vlan 5 and icmp":              false,
		"net 2001:db8::/32":            false,
	} {
		e, err := filter.Parse(expr)
		if err != nil {
			t.Fatal(err)
		}
		if got := looksAtDetail(e.Instructions()); got != want {
			t.Errorf("%q: %v, want %v", expr, got, want)
		}
	}
}

// Every program that calls the filter gets the user's.
func TestConfigureReplacesTheFilterEverywhere(t *testing.T) {
	spec, err := bpf.LoadNftrace()
	if err != nil {
		t.Fatal(err)
	}
	e, err := filter.Parse("tcp port 80")
	if err != nil {
		t.Fatal(err)
	}
	if err := configure(spec, Options{Filter: e.Instructions()}); err != nil {
		t.Fatal(err)
	}
	n := 0
	for name, p := range spec.Programs {
		if !hasSymbol(p.Instructions, filterFunc) {
			continue
		}
		n++
		body := false
		for _, ins := range p.Instructions {
			body = body || ins.Symbol() == filterFunc
			if body && ins.Constant == 80 {
				body, n = false, n-1
				break
			}
		}
		if n != 0 {
			t.Errorf("program %s: the filter does not look for port 80", name)
		}
	}
}

// With preemption off the kernel lets a program call static functions only. The other
// programs' functions stay as they are.
func TestMakeStatic(t *testing.T) {
	spec, err := bpf.LoadNftrace()
	if err != nil {
		t.Fatal(err)
	}
	global := func(program string) (names []string) {
		for i, ins := range spec.Programs[program].Instructions {
			if f := btf.FuncMetadata(&ins); f != nil && i > 0 && f.Linkage != btf.StaticFunc {
				names = append(names, f.Name)
			}
		}
		return names
	}
	before := global(bpf.NftraceProgNat)
	if len(before) == 0 {
		t.Fatalf("%s calls no global functions", bpf.NftraceProgNat)
	}
	for _, program := range []string{bpf.NftraceProgHookEnter, bpf.NftraceProgNftTrace} {
		makeStatic(spec.Programs[program].Instructions)
		if left := global(program); len(left) > 0 {
			t.Errorf("global functions are left in %s: %q", program, left)
		}
	}
	if after := global(bpf.NftraceProgNat); !slices.Equal(after, before) {
		t.Errorf("global functions of %s were %q, are %q", bpf.NftraceProgNat, before, after)
	}
}

// A program that others jump to must share no stack with itself: see without_private_stack.
func TestNoPrivateStack(t *testing.T) {
	spec, err := bpf.LoadNftrace()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(spec.Programs[bpf.NftraceProgHookEnter].Instructions, func(ins asm.Instruction) bool {
		return ins.IsBuiltinCall() && asm.BuiltinFunc(ins.Constant) == asm.FnTailCall
	}) {
		t.Errorf("%s has no tail call", bpf.NftraceProgHookEnter)
	}
}

// Lines of source take time to parse (bpf/nolines). But the kernel wants one at the beginning of
// each function if a program has any, also where the filter's stands.
func TestLines(t *testing.T) {
	e, err := filter.Parse("udp port 9")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []Backend{Fentry, Kprobe} {
		spec, err := loadSpec(Options{Backend: b, Filter: e.Instructions()})
		if err != nil {
			t.Fatal(err)
		}
		for name, p := range spec.Programs {
			for i := range p.Instructions {
				ins := &p.Instructions[i]
				if first := btf.FuncMetadata(ins) != nil; first != (ins.Source() != nil) {
					t.Errorf("%s: instruction %d of %s begins a function: %v; line: %v", b, i, name, first, ins.Source())
				}
			}
		}
	}
}

// The loader sets and reads the variables of both backends' probes by the same Go types, and
// probes of both may share their maps.
func TestBackendsAlike(t *testing.T) {
	layout := func(b Backend) map[string]string {
		spec, err := loadSpec(Options{Backend: b})
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]string{}
		for name, v := range spec.Variables {
			all[name] = fmt.Sprintf("%s+%d, %d bytes", v.SectionName, v.Offset, len(v.Value))
		}
		for name, m := range spec.Maps {
			// One has its own, the other may not allocate in its programs.
			if !strings.HasPrefix(name, constants) && name != bpf.NftraceMapHookProgram && name != bpf.NftraceMapXtTables {
				all["map "+name] = fmt.Sprintf("%s, %d of %d bytes, flags %#x", m.Type, m.MaxEntries, m.KeySize+m.ValueSize, m.Flags)
			}
		}
		return all
	}
	fentry, kprobe := layout(Fentry), layout(Kprobe)
	for name, at := range fentry {
		if kprobe[name] != at {
			t.Errorf("%s: %s for fentry, %q for kprobes", name, at, kprobe[name])
		}
	}
}

// Of copies, one that ran is enough.
func TestSkippedCalls(t *testing.T) {
	for _, tt := range []struct {
		what   string
		misses map[string]uint64
		want   uint64
	}{
		{"nothing", nil, 0},
		{"programs that are there once", map[string]uint64{"nat": 2, "nat_icmp": 3, "nat_icmp6": 5, "nft_trace": 7}, 17},
		{"copies that are numbered", map[string]uint64{"hook_enter_1": 11, "hook_enter_2": 3, "hook_enter_3": 2}, 2},
		{"a first one and its copies", map[string]uint64{"nft_trace": 11, "nft_trace_1": 7, "nft_trace_2": 0, "nft_trace_info": 5}, 5},
		{"both, and others", map[string]uint64{"hook_enter_1": 4, "hook_enter_2": 3, "nft_trace": 2, "nft_trace_1": 5, "deliver_ip": 1, "deliver_ip6": 1}, 7},
	} {
		if got := skippedCalls(tt.misses); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.what, got, tt.want)
		}
	}
}
