package trace

import (
	"errors"
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
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
