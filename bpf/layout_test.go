package bpf

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"go/types"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// The Go types that bpf2go made must lie in memory as the C structs in the object
// beside them do, on each architecture.
func TestLayout(t *testing.T) {
	for arch, stem := range map[string]string{"amd64": "nftrace_x86_bpfel", "arm64": "nftrace_arm64_bpfel"} {
		t.Run(arch, func(t *testing.T) {
			spec, err := ebpf.LoadCollectionSpec(stem + ".o")
			if err != nil {
				t.Fatal(err)
			}
			inC := map[string]*btf.Struct{}
			for typ, err := range spec.Types.All() {
				if err != nil {
					t.Fatal(err)
				}
				if s, ok := typ.(*btf.Struct); ok {
					inC["nftrace"+goName(s.Name)] = s
				}
			}
			inGo, err := records(stem + ".go")
			if err != nil {
				t.Fatal(err)
			}
			sizes := types.SizesFor("gc", arch)
			for name, typ := range inGo {
				c := inC[strings.ToLower(name)]
				if c == nil {
					t.Errorf("%s: no such struct in the object", name)
				} else if err := sameLayout(name, c, typ, sizes); err != nil {
					t.Error(err)
				}
			}
			// The records and the filter's input at the least.
			for _, name := range []string{"NftraceRecHdr", "NftraceRecHook", "NftraceRecPkt", "NftraceRecDev", "NftraceRecNat", "NftracePktTuple"} {
				if inGo[name] == nil {
					t.Errorf("%s.go has no type %s", stem, name)
				}
			}
		})
	}
}

// goName is a C name as far as the Go name shows it.
func goName(c string) string { return strings.ToLower(strings.ReplaceAll(c, "_", "")) }

// records returns the types of a generated file that mirror C structs. They are
// compiled alone, so that a file for another architecture can be read.
func records(file string) (map[string]types.Type, error) {
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, file, nil, 0)
	if err != nil {
		return nil, err
	}
	var src bytes.Buffer
	fmt.Fprintln(&src, "package records")
	var names []string
	for _, d := range f.Decls {
		gen, ok := d.(*ast.GenDecl)
		if !ok || gen.Tok != token.TYPE {
			continue
		}
		for _, s := range gen.Specs {
			spec := s.(*ast.TypeSpec)
			// Records begin with a field that fixes their layout. Enums
			// may be types of fields.
			st, isStruct := spec.Type.(*ast.StructType)
			_, isEnum := spec.Type.(*ast.Ident)
			if !isEnum && (!isStruct || !hostLayout(st)) {
				continue
			}
			if isStruct {
				names = append(names, spec.Name.Name)
			}
			fmt.Fprint(&src, "type ")
			if err := format.Node(&src, fset, spec); err != nil {
				return nil, err
			}
			fmt.Fprintln(&src)
		}
	}
	alone := strings.ReplaceAll(src.String(), "structs.HostLayout", "struct{}")
	if f, err = parser.ParseFile(fset, "", alone, 0); err != nil {
		return nil, err
	}
	pkg, err := new(types.Config).Check("records", fset, []*ast.File{f}, nil)
	if err != nil {
		return nil, err
	}
	m := map[string]types.Type{}
	for _, n := range names {
		m[n] = pkg.Scope().Lookup(n).Type()
	}
	return m, nil
}

func hostLayout(s *ast.StructType) bool {
	if len(s.Fields.List) == 0 {
		return false
	}
	sel, ok := s.Fields.List[0].Type.(*ast.SelectorExpr)
	return ok && sel.Sel.Name == "HostLayout"
}

// sameLayout compares size, and name, offset and type of each member.
func sameLayout(at string, c btf.Type, g types.Type, sizes types.Sizes) error {
	size, err := btf.Sizeof(c)
	if err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	if int64(size) != sizes.Sizeof(g) {
		return fmt.Errorf("%s: %d bytes in C, %d in Go", at, size, sizes.Sizeof(g))
	}
	switch c := btf.UnderlyingType(c).(type) {
	case *btf.Struct:
		s, ok := g.Underlying().(*types.Struct)
		if !ok {
			return fmt.Errorf("%s: a struct in C, %v in Go", at, g)
		}
		fields := slices.Collect(s.Fields())
		offsets := sizes.Offsetsof(fields)
		members := c.Members
		for i, f := range fields {
			if f.Name() == "_" { // padding
				continue
			}
			if len(members) == 0 {
				return fmt.Errorf("%s.%s: not in C", at, f.Name())
			}
			m := members[0]
			members = members[1:]
			at := at + "." + f.Name()
			if goName(m.Name) != strings.ToLower(f.Name()) {
				return fmt.Errorf("%s: %s in C", at, m.Name)
			}
			if int64(m.Offset.Bytes()) != offsets[i] {
				return fmt.Errorf("%s: at %d in C, at %d in Go", at, m.Offset.Bytes(), offsets[i])
			}
			if err := sameLayout(at, m.Type, f.Type(), sizes); err != nil {
				return err
			}
		}
		if len(members) > 0 {
			return fmt.Errorf("%s: no member %s in Go", at, members[0].Name)
		}
	case *btf.Array:
		a, ok := g.Underlying().(*types.Array)
		if !ok || a.Len() != int64(c.Nelems) {
			return fmt.Errorf("%s: array of %d in C, %v in Go", at, c.Nelems, g)
		}
		return sameLayout(at+"[]", c.Type, a.Elem(), sizes)
	case *btf.Int:
		b, ok := g.Underlying().(*types.Basic)
		if !ok {
			return fmt.Errorf("%s: %v in C, %v in Go", at, c, g)
		}
		signed := c.Encoding == btf.Signed || c.Encoding == btf.Char
		if signed == (b.Info()&types.IsUnsigned != 0) {
			return fmt.Errorf("%s: %v in C, %v in Go", at, c, g)
		}
	}
	return nil
}
