package trace

import (
	"errors"
	"testing"

	"github.com/nftrace/nftrace/bpf"
	"github.com/nftrace/nftrace/pkg/events"
)

// A table is read again until the probe has seen which it is, and what was seen of an earlier
// time is not taken for it.
func TestLookup(t *testing.T) {
	failed := errors.New("failed")
	for name, tt := range map[string]struct {
		sees  int // the first reading that the probe sees
		err   error
		reads int
		want  events.TableID
	}{
		"at once": {1, nil, 1, events.TableID{Private: 5, Gen: 1}},
		"later":   {3, nil, 3, events.TableID{Private: 5, Gen: 3}},
		"never":   {lookupTries + 1, nil, lookupTries, events.TableID{}},
		"error":   {1, failed, 1, events.TableID{}},
	} {
		seen := bpf.NftraceLookup{Private: 4, Gen: 4}
		reads := 0
		id, err := lookup(func() error {
			if reads++; reads >= tt.sees {
				seen = bpf.NftraceLookup{Private: 5, Gen: uint64(reads)}
			}
			return tt.err
		}, func() error {
			seen = bpf.NftraceLookup{}
			return nil
		}, func() (bpf.NftraceLookup, error) { return seen, nil })
		if id != tt.want || reads != tt.reads || !errors.Is(err, tt.err) {
			t.Errorf("%s: %+v after %d readings, %v", name, id, reads, err)
		}
	}
}
