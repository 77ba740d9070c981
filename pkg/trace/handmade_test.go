package trace

import (
	"testing"

	"github.com/cilium/ebpf/btf"
)

func TestHandmadeTypes(t *testing.T) {
	spec, err := handmadeTypes()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]map[string]uint32{
		"nft_traceinfo":  {"pkt": 0, "basechain": 8, "rule": 24, "verdict": 32, "trace": 45},
		"nft_rule_dp":    {"handle": 16},
		"nft_base_chain": {"policy": 64, "chain": 80},
		"ebt_table":      {"list": 0, "name": 16, "private": 72},
		"ebt_table_info": {"nentries": 4, "counters": 128},
	} {
		var s *btf.Struct
		if err := spec.TypeByName(name, &s); err != nil {
			t.Fatal(err)
		}
		for member, off := range want {
			if got, err := offsetOf(s, member); err != nil || got != off {
				t.Errorf("%s.%s at %d, want %d (%v)", name, member, got, off, err)
			}
		}
	}
}

func TestMutexAt(t *testing.T) {
	const at = 0xffff888004a00000
	// Two lists, the second empty; a mutex that nobody holds.
	free := []uint64{at + 0x100, at + 0x200, at + 16, at + 16, 0, 0, at + 48, at + 48, 7}
	if off, ok := mutexAt(at, free); !ok || off != 32 {
		t.Errorf("at %d, %v, want 32", off, ok)
	}
	held := append([]uint64(nil), free...)
	held[4] = at
	if off, ok := mutexAt(at, held); ok {
		t.Errorf("a mutex that is held, at %d", off)
	}
	if _, ok := mutexAt(at, free[:7]); ok {
		t.Error("half a mutex")
	}
}
