package trace

import (
	"errors"
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

func TestLacks(t *testing.T) {
	answer := func(err error) func() error { return func() error { return err } }
	yes := feature{"loops", "5.3", answer(nil)}
	no := feature{"modules", "5.11", answer(fmt.Errorf("probe: %w", ebpf.ErrNotSupported))}
	unknown := feature{"maps", "3.18", answer(errors.New("not permitted"))}
	for _, c := range []struct {
		needed []feature
		want   string
	}{
		{nil, ""},
		{[]feature{yes, unknown}, ""},
		{[]feature{yes, no, unknown}, "modules (in Linux 5.11 and newer)"},
		{[]feature{no, yes, no}, "modules (in Linux 5.11 and newer), modules (in Linux 5.11 and newer)"},
	} {
		if got := lacks(c.needed); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestKnowsAE(t *testing.T) {
	u16 := &btf.Int{Name: "unsigned short", Size: 2}
	res1 := btf.Member{Name: "res1", Type: u16, Offset: 96, BitfieldSize: 4}
	ae := btf.Member{Name: "ae", Type: u16, Offset: 96, BitfieldSize: 1}
	for _, c := range []struct {
		of      string
		members []btf.Member
		want    bool
	}{
		{"tcphdr", []btf.Member{res1}, false},
		{"tcphdr", []btf.Member{ae, res1}, true},
		{"other", []btf.Member{ae}, false},
	} {
		b, err := btf.NewBuilder([]btf.Type{&btf.Struct{Name: c.of, Size: 20, Members: c.members}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		spec, err := b.Spec()
		if err != nil {
			t.Fatal(err)
		}
		if got := knowsAE(spec); got != c.want {
			t.Errorf("struct %s %v: %v", c.of, c.members, got)
		}
	}
}
