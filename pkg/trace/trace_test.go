package trace

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"

	"github.com/nftrace/nftrace/bpf"
)

func TestLackedFunction(t *testing.T) {
	proto := &btf.FuncProto{Return: &btf.Void{}}
	b, err := btf.NewBuilder([]btf.Type{
		&btf.Func{Name: "ebt_do_table", Type: proto, Linkage: btf.GlobalFunc},
		&btf.Func{Name: "do_ebt_set_ctl", Type: proto, Linkage: btf.StaticFunc},
		&btf.Int{Name: "do_replace_finish", Size: 4},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := b.Spec()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		functions []string
		want      string
	}{
		{nil, ""},
		{[]string{"ebt_do_table", "do_ebt_set_ctl", "ebt_do_table"}, ""},
		{[]string{"ebt_do_table", "do_replace_finish", "none"}, "do_replace_finish"},
	} {
		if got := lackedFunction(spec, c.functions); got != c.want {
			t.Errorf("%q: got %q, want %q", c.functions, got, c.want)
		}
	}
}

// BenchmarkOpen loads, attaches and detaches the probes. It is for a VM: see make pgo.
func BenchmarkOpen(b *testing.B) {
	for b.Loop() {
		t, err := Open(Options{})
		if err != nil {
			b.Skip(err)
		}
		if err := t.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// A probe of an optional group is attached to a function: where that is not there can be seen.
func TestOptionalGroups(t *testing.T) {
	spec, err := bpf.LoadNftrace()
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		if !g.optional {
			continue
		}
		attached := 0
		for _, name := range g.programs {
			p := spec.Programs[name]
			if p == nil {
				t.Errorf("%s of module %q cannot be optional: it has a program of another object", name, g.module)
			} else if p.AttachTo != "" {
				attached++
			}
		}
		if attached == 0 {
			t.Errorf("module %q: no probe tells whether its functions are there", g.module)
		}
	}
}

// Only root comes so far: CheckKernel asks.
func TestLoadErrorOfRoot(t *testing.T) {
	err := loadError("load the probes", fmt.Errorf("map create: %w", os.ErrPermission))
	for _, want := range []string{"load the probes: ", "although this is root", "CAP_SYS_ADMIN", "seccomp", "--privileged", ": map create: "} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in: %v", want, err)
		}
	}
	if !errors.Is(err, os.ErrPermission) || strings.Contains(err.Error(), "run nftrace as root") {
		t.Error(err)
	}
}

func TestOwnNetnsError(t *testing.T) {
	err := ownNetnsError(fmt.Errorf("netlink receive: %w", os.ErrPermission))
	if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "it lacks CAP_SYS_ADMIN or CAP_NET_ADMIN") {
		t.Error(err)
	}
	if err := ownNetnsError(errors.New("broken")); strings.Contains(err.Error(), "CAP_") {
		t.Error(err)
	}
}

func TestRan(t *testing.T) {
	refused := errors.New("refused")
	if err := ran(0, refused); err != refused {
		t.Error(err)
	}
	if err := ran(0, nil); err != nil {
		t.Error(err)
	}
	if err := ran(1, nil); err == nil || strings.Contains(err.Error(), "%!") || strings.Contains(err.Error(), "nil") {
		t.Error(err)
	}
}
