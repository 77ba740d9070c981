package trace

import (
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"github.com/nftrace/nftrace/bpf"
)

func TestDropLackedKfuncs(t *testing.T) {
	// The kernel has one of them.
	proto := &btf.FuncProto{Return: &btf.Void{}}
	b, err := btf.NewBuilder([]btf.Type{&btf.Func{Name: "bpf_rdonly_cast", Type: proto, Linkage: btf.StaticFunc}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := b.Spec()
	if err != nil {
		t.Fatal(err)
	}
	spec, err := bpf.LoadNftrace()
	if err != nil {
		t.Fatal(err)
	}
	// Where a function begins with one.
	f := &btf.Func{Name: "f", Type: proto, Linkage: btf.GlobalFunc}
	spec.Programs["handmade"] = &ebpf.ProgramSpec{Instructions: asm.Instructions{
		btf.WithFuncMetadata(asm.LoadImm(asm.R1, 0, asm.DWord), f).WithSymbol("f").WithSource(asm.Comment("f")).WithReference("bpf_preempt_disable"),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	}}
	was := map[string]asm.Instructions{}
	for name, p := range spec.Programs {
		was[name] = slices.Clone(p.Instructions)
	}
	dropLackedKfuncs(spec.Programs, kernel)
	found := map[string]int{} // calls and addresses
	for name, p := range spec.Programs {
		if p.Instructions.Size() != was[name].Size() {
			t.Errorf("%s is of another size", name)
		}
		for i := range p.Instructions {
			old, ins := &was[name][i], &p.Instructions[i]
			if old.IsKfuncCall() && !slices.Contains(kfuncs, old.Reference()) {
				t.Errorf("%s: %v is not in kfuncs", name, old)
			}
			if ins.Symbol() != old.Symbol() || btf.FuncMetadata(ins) != btf.FuncMetadata(old) || ins.Source() != old.Source() {
				t.Errorf("%s: %v lost what belongs to it: %v", name, old, ins)
			}
			switch ref := old.Reference(); {
			case !slices.Contains(kfuncs, ref):
			case ref == "bpf_rdonly_cast":
				if ins.Reference() != ref {
					t.Errorf("%s: %v is there, and was dropped: %v", name, old, ins)
				}
			default:
				found[ref]++
				if ins.IsKfuncCall() || ins.Reference() != "" || ins.Constant != 0 || ins.OpCode.IsDWordLoad() && ins.Src != 0 {
					t.Errorf("%s: %v is left: %v", name, old, ins)
				}
			}
		}
	}
	for _, name := range kfuncs[:2] {
		if found[name] == 0 {
			t.Errorf("no program has %s: that tests nothing", name)
		}
	}
}
