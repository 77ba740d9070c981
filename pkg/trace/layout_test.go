package trace

import (
	"reflect"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/btf"

	"github.com/nftrace/nftrace/bpf"
	"github.com/nftrace/nftrace/pkg/filter"
)

// pkg/filter compiles loads at the offsets of its Tuple; the probes hand it a struct
// pkt_tuple. (Package bpf's tests see to it that both objects have the same.)
func TestTupleLayout(t *testing.T) {
	spec, err := bpf.LoadNftrace()
	if err != nil {
		t.Fatal(err)
	}
	var c *btf.Struct
	if err := spec.Types.TypeByName("pkt_tuple", &c); err != nil {
		t.Fatal(err)
	}
	if size := unsafe.Sizeof(filter.Tuple{}); size != uintptr(c.Size) {
		t.Errorf("filter.Tuple has %d bytes, struct pkt_tuple %d", size, c.Size)
	}
	g := reflect.TypeFor[filter.Tuple]()
	if g.NumField() != len(c.Members) {
		t.Fatalf("filter.Tuple has %d fields, struct pkt_tuple %d members", g.NumField(), len(c.Members))
	}
	for i, m := range c.Members {
		f := g.Field(i)
		name := strings.ReplaceAll(m.Name, "_", "")
		if !strings.EqualFold(f.Name, name) && !(f.Name == "_" && name == "pad") {
			t.Errorf("field %d is %s in filter.Tuple, %s in struct pkt_tuple", i, f.Name, m.Name)
		}
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			t.Fatal(err)
		}
		if f.Offset != uintptr(m.Offset.Bytes()) || f.Type.Size() != uintptr(size) {
			t.Errorf("%s: %d bytes at %d in filter.Tuple, %d bytes at %d in struct pkt_tuple",
				m.Name, f.Type.Size(), f.Offset, size, m.Offset.Bytes())
		}
	}
}
