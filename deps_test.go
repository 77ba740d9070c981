package nftrace

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/nftrace/nftrace"

// mayImport is the direction of dependencies: what each package may import
// besides the standard library. A path that ends in /... stands for all below it.
// A package that no key names may not exist. The longest key that fits counts.
var mayImport = map[string]struct {
	code  []string
	tests []string // besides the above
}{
	"": {},

	"bpf":           {code: []string{"github.com/cilium/ebpf"}, tests: []string{"github.com/cilium/ebpf/btf"}},
	"bpf/nolines":   {},
	"pkg/events":    {code: []string{module + "/bpf"}},
	"pkg/symbolize": {code: []string{"github.com/mdlayher/netlink", "github.com/cilium/ebpf/btf", "golang.org/x/sys/unix"}},
	"pkg/filter":    {code: []string{"github.com/cilium/ebpf/asm"}, tests: []string{"golang.org/x/net/bpf"}},
	"pkg/trace":     {code: []string{module + "/bpf", module + "/pkg/events", module + "/pkg/filter", "github.com/cilium/ebpf/...", "github.com/mdlayher/netlink", "golang.org/x/sys/unix"}},
	"pkg/render":    {code: []string{module + "/pkg/events"}},
	"cmd/nftrace":   {code: []string{module + "/pkg/...", "github.com/spf13/pflag", "golang.org/x/sys/unix"}, tests: []string{module + "/bpf", module + "/testenv/...", "golang.org/x/tools/txtar"}},
	"testenv/...":   {code: []string{module + "/testenv/...", "github.com/cilium/ebpf/...", "github.com/mdlayher/netlink", "golang.org/x/sys/unix"}, tests: []string{"golang.org/x/tools/txtar"}},
}

// goPackage is what one directory's files import, for any system and architecture.
type goPackage struct {
	path  string // from the module's root; "" for the root
	code  []string
	tests []string
}

func TestDependencies(t *testing.T) {
	packages := map[string]*goPackage{}
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && file != "." && (d.Name() == "testdata" || file == "build" || strings.HasPrefix(d.Name(), ".")):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(file, ".go"):
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir := strings.TrimPrefix(filepath.ToSlash(filepath.Dir(file)), ".")
		p := packages[dir]
		if p == nil {
			p = &goPackage{path: dir}
			packages[dir] = p
		}
		for _, spec := range f.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if strings.HasSuffix(file, "_test.go") {
				p.tests = append(p.tests, name)
			} else {
				p.code = append(p.code, name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range packages {
		for _, msg := range forbidden(*p) {
			t.Error(msg)
		}
	}
	for row := range mayImport {
		dir := strings.TrimSuffix(row, "/...")
		if packages[dir] == nil {
			t.Errorf("the table has a row for %s, where there is no package", row)
		}
	}
}

// A table that lets everything through would pass unnoticed.
func TestForbidden(t *testing.T) {
	for _, tt := range []struct {
		p    goPackage
		want int
	}{
		{goPackage{path: "pkg/render", code: []string{"fmt", "net/netip", module + "/pkg/events"}}, 0},
		{goPackage{path: "pkg/render", code: []string{module + "/pkg/symbolize"}}, 1},
		{goPackage{path: "pkg/symbolize", code: []string{module + "/pkg/events", module + "/bpf"}}, 2},
		{goPackage{path: "pkg/trace", code: []string{"github.com/cilium/ebpf", "github.com/cilium/ebpf/link"}}, 0},
		{goPackage{path: "pkg/filter", code: []string{"golang.org/x/net/bpf"}}, 1},
		{goPackage{path: "pkg/filter", tests: []string{"golang.org/x/net/bpf"}}, 0},
		{goPackage{path: "pkg/filter", tests: []string{"example.com/x"}}, 1},
		{goPackage{path: "cmd/nftrace", code: []string{module + "/testenv"}}, 1},
		{goPackage{path: "testenv/cmd/vm", code: []string{module + "/testenv"}}, 0},
		{goPackage{path: "testenv/topo", code: []string{module + "/pkg/events"}}, 1},
		{goPackage{path: "pkg/new"}, 1},
		{goPackage{path: "cmd/new", tests: []string{"fmt"}}, 1},
	} {
		if got := forbidden(tt.p); len(got) != tt.want {
			t.Errorf("%s: got %q, want %d complaints", tt.p.path, got, tt.want)
		}
	}
}

// forbidden says which imports of a package are not in the table.
func forbidden(p goPackage) (msgs []string) {
	key, found := "", false
	for k := range mayImport {
		if covers(k, p.path) && len(k) >= len(key) {
			key, found = k, true
		}
	}
	if !found {
		return []string{p.path + " is not in the table of deps_test.go"}
	}
	row := mayImport[key]
	check := func(imports, allowed []string, of string) {
		for _, i := range imports {
			if !standard(i) && !slices.ContainsFunc(allowed, func(a string) bool { return covers(a, i) }) {
				msgs = append(msgs, "package "+path.Join(module, p.path)+" may not import "+i+of)
			}
		}
	}
	check(p.code, row.code, "")
	check(p.tests, slices.Concat(row.code, row.tests, []string{path.Join(module, p.path)}), ", nor may its tests")
	return msgs
}

func covers(pattern, path string) bool {
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == below || strings.HasPrefix(path, below+"/")
	}
	return path == pattern
}

// standard tells whether a path is one of the standard library: its first element has
// no dot.
func standard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}
