package trace

import (
	"testing"

	"github.com/cilium/ebpf/btf"
)

func TestHandmadeTypes(t *testing.T) {
	for module, structs := range map[string]map[string]map[string]uint32{
		nftModule: {
			"nft_traceinfo":  {"pkt": 0, "basechain": 8, "rule": 24, "verdict": 32, "trace": 45},
			"nft_rule_dp":    {"handle": 16},
			"nft_base_chain": {"policy": 64, "chain": 80},
		},
		ebtModule: {
			"ebt_table":      {"list": 0, "name": 16, "private": 72},
			"ebt_table_info": {"nentries": 4, "counters": 128},
		},
	} {
		spec, err := handmadeTypes(module)
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range structs {
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
}

// Of a kernel whose rules are of struct nft_rule the probes learn where the handle is.
func TestOldRule(t *testing.T) {
	u64 := &btf.Typedef{Name: "u64", Type: &btf.Int{Name: "long long unsigned int", Size: 8}}
	types := func(name string) *btf.Spec {
		b, err := btf.NewBuilder([]btf.Type{&btf.Struct{Name: name, Size: 32, Members: []btf.Member{
			at("list", u64, 0), {Name: "handle", Type: u64, Offset: 8 * 24, BitfieldSize: 42}, {Name: "genmask", Type: u64, Offset: 8*24 + 42, BitfieldSize: 2},
		}}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		spec, err := b.Spec()
		if err != nil {
			t.Fatal(err)
		}
		return spec
	}
	spec, err := oldRule(types("nft_rule"))
	if err != nil {
		t.Fatal(err)
	}
	var s *btf.Struct
	if err := spec.TypeByName("nft_rule_dp", &s); err != nil {
		t.Fatal(err)
	}
	if len(s.Members) != 1 || s.Members[0].Name != "handle" || s.Members[0].Offset != 8*24 || s.Members[0].BitfieldSize != 42 {
		t.Errorf("got %+v", s.Members)
	}
	if spec, err := oldRule(types("nft_rule_dp")); spec != nil || err != nil {
		t.Errorf("a kernel that has it: %v, %v", spec, err)
	}
	if _, err := oldRule(types("nft_table")); err == nil {
		t.Error("a kernel that has neither was accepted")
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
