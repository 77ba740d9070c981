package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestDescendants(t *testing.T) {
	proc := t.TempDir()
	for name, stat := range map[string]string{
		"1": "1 (init) S 0 1", "7": "7 (sh) S 1 7", "8": "8 (a) S 1 (b)) S 7 7", "9": "9 (sleep) S 8 7", "10": "10 (sleep) S 7 7",
		"11": "11 (daemon) S 1 7", "12": "12 (sleep) S 11 7", "13": "", "14": "14 (x)", "self": "15 (x) S 7 7",
	} {
		if err := os.Mkdir(filepath.Join(proc, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, name, "stat"), []byte(stat+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got := descendants(proc, 7)
	slices.Sort(got)
	if want := []int{8, 9, 10}; !slices.Equal(got, want) {
		t.Errorf("got %d, want %d", got, want)
	}
}
