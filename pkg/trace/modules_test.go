package trace

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// A kernel where some is built in and some is a module.
func TestModules(t *testing.T) {
	proto := &btf.FuncProto{Return: &btf.Void{}}
	b, err := btf.NewBuilder([]btf.Type{
		&btf.Func{Name: "xt_replace_table", Type: proto, Linkage: btf.StaticFunc},
		&btf.Func{Name: "ipt_do_table", Type: proto, Linkage: btf.StaticFunc},
		&btf.Func{Name: "nft_do_chain", Type: proto, Linkage: btf.StaticFunc},
		&btf.Struct{Name: "br_forward", Size: 4}, // no function
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := b.Spec()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, content string) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("x_tables/parameters/jumps", "1\n") // built in, with parameters
	write("nf_nat/initstate", "live\n")
	write("ebtables/initstate", "coming\n")
	m := findModules(dir, kernel)
	for name, want := range map[string]struct{ has, builtIn bool }{
		"":               {true, false},
		"x_tables":       {true, true},
		"ip_tables":      {true, true},
		"nf_tables":      {true, true},
		"nf_nat":         {true, false},
		"ebtables":       {false, false},
		"bridge":         {false, false},
		"arp_tables":     {false, false},
		"nf_defrag_ipv6": {false, false},
	} {
		if got := m.has(name); got != want.has || m.builtIn[name] != want.builtIn {
			t.Errorf("module %q: has %v, built in %v, want %v", name, got, m.builtIn[name], want)
		}
	}
	if lacks := m.lacksTypes("x_tables"); lacks != "" {
		t.Errorf("what is built in has type information: %s", lacks)
	}
	// It is loaded later.
	write("bridge/initstate", "live\n")
	write("ebtables/initstate", "live\n")
	for _, name := range []string{"bridge", "ebtables"} {
		if !m.has(name) || m.builtIn[name] {
			t.Errorf("%s was loaded, and is not there", name)
		}
	}
}

// Of each module that is probed, or waited for, it can be seen whether it is built in.
func TestFunctionOfModules(t *testing.T) {
	names := append([]string{}, waitFor...)
	for _, g := range groups {
		if g.module != "" {
			names = append(names, g.module)
		}
	}
	for _, name := range names {
		if functionOf[name] == "" {
			t.Errorf("no function tells whether %s is built in", name)
		}
	}
}

// A module is said to be traced only once it is.
func TestAttachLoaded(t *testing.T) {
	refused := errors.New("refused")
	for _, tt := range []struct {
		name     string
		err      error
		untraced []untraced
		want     []string
	}{
		{"attached", nil, nil, []string{"nf_tables", "ebtables"}},
		{"not all of it", nil, []untraced{{"ebtables", "ebtables is not traced"}}, []string{"nf_tables"}},
		{"refused", refused, nil, nil},
	} {
		loaded := map[string]bool{"nf_tables": true, "ebtables": true}
		tr := Tracer{
			modules: &modules{dir: t.TempDir(), builtIn: loaded}, untraced: tt.untraced,
			pending: []group{{module: "nf_tables"}, {module: "bridge"}}, waiting: []string{"nf_tables", "ip_tables", "ebtables"},
		}
		got, err := tr.attachLoaded(func(gs []group) error {
			if len(gs) != 1 || gs[0].module != "nf_tables" {
				t.Errorf("%s: attaches %+v", tt.name, gs)
			}
			return tt.err
		})
		if !slices.Equal(got, tt.want) || err != tt.err {
			t.Errorf("%s: got %q, %v, want %q", tt.name, got, err, tt.want)
		}
		if !slices.Equal(tr.Waiting(), []string{"ip_tables"}) {
			t.Errorf("%s: waits for %q", tt.name, tr.Waiting())
		}
	}
}
