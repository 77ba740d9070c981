package main

import (
	"os"
	"strings"
	"testing"
)

// What README.md says of the command line is what --help says.
func TestReadmeUsage(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), "```\n"+usage+"```\n") {
		t.Error("README.md does not have the text of --help: copy it there")
	}
}
